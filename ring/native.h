/* What the cffi wrapper of the data plane includes. */
#pragma once

#include "ring/inflight.h"
#include "ring/memory.h"
#include "ring/stop.h"
#include "ring/worker.h"
#include "virtio/block.h"
