/* Clusters of an external data file that hold zeros, stable, as a hole of the host's does: plain data may be written to
 * one and linked without any barrier. Each is so until its entry changes for the first time. One thread.
 */
#pragma once

#include <stdint.h>

struct untouched {
    uint64_t nclusters;
    uint8_t *bits; /* bit n % 8 of byte n / 8 */
};

static inline void untouched_add(struct untouched *untouched, uint64_t first, uint64_t last)
{
    for (; first <= last && first < untouched->nclusters; first++)
        untouched->bits[first >> 3] |= (uint8_t)(1 << (first & 7));
}

/* -> whether all clusters from first to last are. */
static inline int untouched_has(const struct untouched *untouched, uint64_t first, uint64_t last)
{
    for (; first <= last; first++)
        if (first >= untouched->nclusters || !(untouched->bits[first >> 3] >> (first & 7) & 1))
            return 0;
    return 1;
}

static inline void untouched_forget(struct untouched *untouched, uint64_t first, uint64_t last)
{
    for (; first <= last && first < untouched->nclusters; first++)
        untouched->bits[first >> 3] &= (uint8_t)~(1 << (first & 7));
}
