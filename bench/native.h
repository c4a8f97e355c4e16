/* What the cffi wrapper of the driver's side and the load generator includes. */
#pragma once

#include "bench/driver.h"
#include "bench/identity.h"
#include "bench/load.h"
#include "bench/pattern.h"
