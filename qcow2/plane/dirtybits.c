#include "qcow2/plane/dirtybits.h"

#include <errno.h>

#include "ring/assertion.h"

/* No locked instruction, and no store where the bits are set: the line stays shared. Volatile, so that the store comes
 * before whatever the caller does next: that is what a death of the process may keep. */
static void set_byte(uint8_t *bits, uint64_t byte, uint8_t mask)
{
    volatile uint8_t *at = bits + byte;

    if ((*at & mask) != mask)
        *at |= mask;
}

static void set_bits(const struct live_bitmap *bitmap, uint64_t guest_offset, uint64_t last_offset)
{
    uint64_t first = guest_offset >> bitmap->granularity_bits, last = last_offset >> bitmap->granularity_bits;
    uint8_t head = 0xff << (first & 7), tail = 0xff >> (7 - (last & 7));

    if (first >> 3 == last >> 3) {
        set_byte(bitmap->bits, first >> 3, head & tail);
        return;
    }
    set_byte(bitmap->bits, first >> 3, head);
    for (uint64_t byte = (first >> 3) + 1; byte < last >> 3; byte++)
        set_byte(bitmap->bits, byte, 0xff);
    set_byte(bitmap->bits, last >> 3, tail);
}

int dirty_bits_set(struct dirty_bits *dirty, uint64_t guest_offset, uint64_t nbytes)
{
    uint64_t last_offset = guest_offset + nbytes - 1;
    uint64_t first = guest_offset >> dirty->zone_bits, last = last_offset >> dirty->zone_bits;

    ASSERT(nbytes && last_offset >= guest_offset);
    if (last >= dirty->nzones)
        return -EAGAIN;
    for (uint64_t zone = first; zone <= last; zone++)
        if (dirty->zones[zone] == ZONE_COLD)
            return -EAGAIN;
    for (uint64_t zone = first; zone <= last; zone++)
        if (dirty->zones[zone] != ZONE_USED)
            dirty->zones[zone] = ZONE_USED;
    dirty->nmarks++;
    for (uint32_t i = 0; i < dirty->nbitmaps; i++)
        set_bits(&dirty->bitmaps[i], guest_offset, last_offset);
    return 0;
}
