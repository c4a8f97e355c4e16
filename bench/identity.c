#include "bench/identity.h"

void identity_map_translate(void *context, uint64_t guest_offset, uint64_t nbytes, int is_write,
                            struct extent_reader *reader, struct extent *out)
{
    const struct identity_map *map = context;
    uint64_t left = guest_offset < map->nbytes ? map->nbytes - guest_offset : 0;

    *out = (struct extent){.kind = EXTENT_PUNT, .slot = map->slot, .nbytes = nbytes};
    if (left == 0 || (is_write && !map->writable))
        return;
    out->kind = EXTENT_DATA;
    out->host_offset = guest_offset;
    out->nbytes = nbytes < left ? nbytes : left;
}

uintptr_t identity_map_translate_address(void)
{
    return (uintptr_t)identity_map_translate;
}
