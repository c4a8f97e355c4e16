/* Guest memory: the regions a front-end shares, and what lies where in them. */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#define GUEST_REGIONS_MAX 512

struct guest_region {
    uint64_t guest_address;
    uint64_t user_address; /* the front-end's own, used for rings only */
    uint64_t nbytes;
    uint8_t *host; /* our address of the first byte */
    void *mapping; /* what munmap gets: host aligned down to a page of the file */
    uint64_t mapping_nbytes;
    const uint32_t *losses; /* in it; NULL: nobody counts them */
};

/* A table of regions that do not overlap, sorted by guest address. */
struct guest_memory {
    uint32_t count;
    uint32_t last; /* the region found last: guests work in one place */
    struct guest_region regions[GUEST_REGIONS_MAX];
};

/* Map `nbytes` at `mmap_offset` of the file, which need not be page aligned.
 * -EINVAL: an address wraps, a size is 0. -ENXIO: the file is shorter. */
int guest_region_map(struct guest_region *region, int fd, uint64_t guest_address, uint64_t user_address,
                     uint64_t nbytes, uint64_t mmap_offset);
void guest_region_unmap(struct guest_region *region);

/* Borrow a mapped region into the table. -EEXIST: it overlaps, -E2BIG: it is full. */
int guest_memory_add(struct guest_memory *memory, const struct guest_region *region);

/* Describe [guest_address, guest_address + nbytes) by at most `limit` pieces.
 * -> their number; -EFAULT: a byte is in no region; -E2BIG: more pieces. */
int guest_memory_translate(struct guest_memory *memory, uint64_t guest_address, uint64_t nbytes,
                           struct iovec *pieces, int limit);

/* The guest address of a byte of ours that lies in a region. -> false if it lies in none. */
bool guest_memory_locate(const struct guest_memory *memory, const void *host, uint64_t *guest_address);

/* Whether a page of the region that holds `host`, or, NULL, of any region, is gone, and zeros are in its place. */
bool guest_memory_has_lost(const struct guest_memory *memory, const void *host);

/* Our address of a part of a ring, which lies in one region; NULL if it does not. */
void *guest_memory_ring(const struct guest_memory *memory, uint64_t user_address, uint64_t nbytes);
