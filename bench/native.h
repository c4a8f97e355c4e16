/* What the cffi wrapper of the load generator includes. */
#pragma once

#include "bench/load.h"
#include "bench/pattern.h"
