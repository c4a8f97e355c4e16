/* The live bits of the bitmaps that record: which granules of the disk have changed. One thread.
 *
 * The disk is cut into zones. While a zone is hot, all its bits are set in the image, stable, so that a power loss
 * leaves too much there and never too little; what really changed is here, in memory that may outlive the process.
 */
#pragma once

#include <stdint.h>

enum zone { ZONE_COLD, ZONE_HOT, ZONE_USED /* hot, and lately marked in */ };

struct live_bitmap {
    uint8_t *bits; /* bit n is bit n % 8 of byte n / 8 */
    uint32_t granularity_bits;
};

struct dirty_bits {
    uint64_t nzones; /* zones past them are cold */
    uint64_t nmarks; /* calls that have set something, or found it set */
    uint32_t zone_bits;
    uint32_t nbitmaps;
    uint8_t *zones; /* enum zone */
    struct live_bitmap *bitmaps;
};

/* Note in each bitmap that the guest's bytes change, of which there is one at least. -> 0; -EAGAIN: a zone is cold,
 * nothing is noted. */
int dirty_bits_set(struct dirty_bits *dirty, uint64_t guest_offset, uint64_t nbytes);
