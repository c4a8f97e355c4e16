/* The guest clusters that Python has locked, counted so that a range is quickly found to be free. */
#include <stdbool.h>

#include "qcow2/plane/l2map.h"
#include "ring/assertion.h"

static uint32_t *counter(uint32_t *counters, uint32_t size, uint64_t number)
{
    return &counters[(number * UINT64_C(0x9e3779b97f4a7c15) >> 32) & (size - 1)];
}

static void add(uint32_t *counters, uint32_t size, uint64_t first, uint64_t last, uint32_t by)
{
    for (uint64_t number = first; number <= last; number++)
        *counter(counters, size, number) += by;
}

static bool has_any(const uint32_t *counters, uint32_t size, uint64_t first, uint64_t last)
{
    for (uint64_t number = first; number <= last; number++)
        if (*counter((uint32_t *)counters, size, number))
            return true;
    return false;
}

static void count_range(struct l2map *map, uint64_t first, uint64_t last, uint32_t by)
{
    struct range_locks *locks = &map->locks;
    uint64_t first_block = first >> map->slice_bits, last_block = last >> map->slice_bits;

    locks->count += by;
    if (last_block - first_block >= LOCK_NARROW) {
        locks->wide += by;
        return;
    }
    add(locks->touched, LOCK_BLOCKS, first_block, last_block, by);
    if (last - first < LOCK_NARROW)
        add(locks->clusters, LOCK_CLUSTERS, first, last, by);
    else
        add(locks->covered, LOCK_BLOCKS, first_block, last_block, by);
}

void l2map_lock(struct l2map *map, uint64_t first, uint64_t last)
{
    count_range(map, first, last, 1);
}

void l2map_unlock(struct l2map *map, uint64_t first, uint64_t last)
{
    ASSERT(map->locks.count && l2map_is_locked(map, first, last));
    count_range(map, first, last, UINT32_MAX);
}

int l2map_is_locked(const struct l2map *map, uint64_t first, uint64_t last)
{
    const struct range_locks *locks = &map->locks;
    uint64_t first_block = first >> map->slice_bits, last_block = last >> map->slice_bits;

    if (!locks->count)
        return 0;
    if (locks->wide || last_block - first_block >= LOCK_NARROW)
        return 1;
    if (last - first >= LOCK_NARROW)
        return has_any(locks->touched, LOCK_BLOCKS, first_block, last_block);
    return has_any(locks->covered, LOCK_BLOCKS, first_block, last_block) ||
           has_any(locks->clusters, LOCK_CLUSTERS, first, last);
}
