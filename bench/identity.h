/* The extent map of a raw file: guest offsets are host offsets. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "ring/extent.h"

struct identity_map {
    uint64_t nbytes; /* of the disk; past it only Python can tell */
    uint32_t slot;
    bool writable;
};

void identity_map_translate(void *context, uint64_t guest_offset, uint64_t nbytes, int is_write,
                            struct extent_reader *reader, struct extent *out);

/* The function, as Python hands it on. */
uintptr_t identity_map_translate_address(void);
