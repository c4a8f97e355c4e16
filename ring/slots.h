/* Where a packed ring keeps the chains that are fetched and not published.
 *
 * A buffer id is any 16-bit number the driver likes. Inside, a chain has a
 * slot below the size of the ring, so that tables have the ring's size.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

#include "ring/assertion.h"

#define BUFFER_IDS 65536

struct slots {
    uint16_t *lengths; /* by slot: descriptors of its chain; 0: it is free */
    uint16_t *ids;     /* by slot: its chain's buffer id */
    uint16_t *free;    /* a stack */
    uint16_t *by_id;   /* by buffer id: slot + 1; 0: it is the driver's */
    uint32_t free_count;
};

/* -> false: no memory. */
static inline bool slots_init(struct slots *slots, uint32_t size)
{
    *slots = (struct slots){
        .lengths = calloc(size, sizeof(*slots->lengths)),
        .ids = calloc(size, sizeof(*slots->ids)),
        .free = calloc(size, sizeof(*slots->free)),
        .by_id = calloc(BUFFER_IDS, sizeof(*slots->by_id)), /* the kernel gives only the pages in use */
        .free_count = size,
    };
    if (!slots->lengths || !slots->ids || !slots->free || !slots->by_id)
        return false;
    for (uint32_t i = 0; i < size; i++)
        slots->free[i] = size - 1 - i;
    return true;
}

static inline void slots_deinit(struct slots *slots)
{
    free(slots->lengths);
    free(slots->ids);
    free(slots->free);
    free(slots->by_id);
    *slots = (struct slots){.free_count = 0};
}

static inline bool slots_hold(const struct slots *slots, uint16_t id)
{
    return slots->by_id[id] != 0;
}

/* Take a slot for a chain of `length` descriptors; there is one, because a chain takes a descriptor at least. */
static inline uint16_t slots_take(struct slots *slots, uint16_t id, uint16_t length)
{
    uint16_t slot;

    ASSERT(slots->free_count && length && !slots->by_id[id]);
    slot = slots->free[--slots->free_count];
    slots->ids[slot] = id;
    slots->lengths[slot] = length;
    slots->by_id[id] = slot + 1;
    return slot;
}

static inline void slots_give_back(struct slots *slots, uint16_t slot)
{
    ASSERT(slots->lengths[slot]);
    slots->by_id[slots->ids[slot]] = 0;
    slots->lengths[slot] = 0;
    slots->free[slots->free_count++] = slot;
}
