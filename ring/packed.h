/* Positions and flags of a packed ring: what both of its sides, and in-flight tracking, reckon with. */
#pragma once

#include <linux/virtio_ring.h>
#include <stdbool.h>
#include <stdint.h>

#include "ring/inflight.h"

#define PACKED_AVAILABLE (1u << VRING_PACKED_DESC_F_AVAIL)
#define PACKED_USED (1u << VRING_PACKED_DESC_F_USED)

static inline uint16_t packed_mark(bool available, bool used)
{
    return (available ? PACKED_AVAILABLE : 0) | (used ? PACKED_USED : 0);
}

static inline bool packed_is_available(uint16_t flags, bool wrap)
{
    return (flags & (PACKED_AVAILABLE | PACKED_USED)) == packed_mark(wrap, !wrap);
}

static inline bool packed_is_used(uint16_t flags, bool wrap)
{
    return (flags & (PACKED_AVAILABLE | PACKED_USED)) == packed_mark(wrap, wrap);
}

/* `count` is at most the size. */
static inline struct ring_position position_after(struct ring_position from, uint32_t count, uint32_t size)
{
    uint32_t index = from.index + count;

    return index < size ? (struct ring_position){index, from.wrap}
                        : (struct ring_position){index - size, !from.wrap};
}

/* How far it is from one to the other, less than two laps. */
static inline uint32_t position_distance(struct ring_position from, struct ring_position to, uint32_t size)
{
    uint32_t start = from.index + (from.wrap ? 0 : size), end = to.index + (to.wrap ? 0 : size);

    return end >= start ? end - start : end + 2 * size - start;
}

/* A position as SET_VRING_BASE and the event suppression structures have it: the wrap counter is bit 15. */
static inline struct ring_position position_parse(uint16_t packed)
{
    return (struct ring_position){packed & 0x7fff, packed >> 15};
}

static inline uint16_t position_pack(struct ring_position position)
{
    return position.index | (uint16_t)position.wrap << 15;
}

/* Whether someone who wants to be told at `wanted`, a position on the wire, is to be
 * told now that `count` descriptors ended before `now`. */
static inline bool packed_need_event(uint16_t wanted, struct ring_position now, uint32_t count, uint32_t size)
{
    struct ring_position event = position_parse(wanted);
    uint16_t index = event.wrap == now.wrap ? event.index : event.index - size;

    return vring_need_event(index, now.index, now.index - count);
}
