/* Host clusters that the extent map has let go of: nothing in the file leads to them, they are still counted. One thread. */
#pragma once

#include <stdint.h>

#define FREED_CLUSTERS 2048

struct freed {
    uint32_t is_open; /* the reaper will come for them */
    uint32_t count;
    uint64_t clusters[FREED_CLUSTERS];
};
