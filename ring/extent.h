/* The one seam between a device and an image: where are these guest bytes?
 *
 * An image that can answer without deciding anything hands the worker an extent
 * map: a function and its context. The worker calls it, on its own thread and
 * with no lock, for each piece of a read or write. The answer holds until the
 * worker next returns to Python.
 */
#pragma once

#include <stdint.h>

enum extent_kind {
    EXTENT_PUNT = 0, /* only Python can tell, or the range needs an allocation, a copy, an error */
    EXTENT_DATA = 1, /* the bytes at host_offset of the file in `slot` */
    EXTENT_ZERO = 2, /* reads as zeros; never given for a write */
};

struct extent {
    uint32_t kind;
    uint32_t slot;        /* which of the worker's files */
    uint64_t host_offset; /* EXTENT_DATA only */
    uint64_t nbytes;      /* > 0 and <= what was asked, from guest_offset on */
};

/* Describe the longest run at guest_offset, at most nbytes, that one host
 * operation can serve. For a write EXTENT_DATA promises that overwriting those
 * host bytes in place is all there is to do. */
typedef void (*extent_translate)(void *context, uint64_t guest_offset, uint64_t nbytes, int is_write,
                                 struct extent *out);

_Static_assert(sizeof(struct extent) == 24, "struct extent is shared between extensions");
