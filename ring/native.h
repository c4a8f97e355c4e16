/* What the cffi wrapper of the data plane includes. */
#pragma once

#include "ring/driver.h"
#include "ring/identity.h"
#include "ring/inflight.h"
#include "ring/memory.h"
#include "ring/worker.h"
#include "virtio/block.h"
