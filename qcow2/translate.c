/* The extent map: answers from the slices in memory, and from the backing image's map where nothing is allocated. */
#include "qcow2/l2map.h"

#include <string.h>

/* What shows through an unallocated run: the backing image's answer, clipped; zeros past its end or without one. */
void l2map_translate_backing(const struct l2map *map, uint64_t guest_offset, uint64_t nbytes, struct extent *out)
{
    memset(out, 0, sizeof(*out));
    out->nbytes = nbytes;
    if (!map->has_backing || guest_offset >= map->backing_size) {
        out->kind = EXTENT_ZERO;
        return;
    }
    if (map->backing_translate)
        map->backing_translate(map->backing_context, guest_offset, least(nbytes, map->backing_size - guest_offset), 0,
                               out);
}

static void translate_run(struct l2map *map, uint64_t guest_offset, uint64_t nbytes, int is_write, struct extent *out)
{
    struct l2_run run;

    l2map_describe(map, guest_offset, nbytes, &run);
    memset(out, 0, sizeof(*out));
    out->nbytes = run.nbytes;
    if (run.kind == L2_DATA && map->slot != SLOT_UNKNOWN && (!is_write || (map->writable && run.copied))) {
        out->kind = EXTENT_DATA;
        out->slot = map->slot;
        out->host_offset = run.host_offset;
    } else if (!is_write && (run.kind == L2_ZERO_PLAIN || run.kind == L2_ZERO_ALLOCATED)) {
        out->kind = EXTENT_ZERO;
    } else if (is_write && (run.kind == L2_UNALLOCATED || run.kind == L2_ZERO_PLAIN)) {
        uint64_t in_cluster = guest_offset & ((UINT64_C(1) << map->cluster_bits) - 1);

        out->kind = map->stock && map->writable ? EXTENT_FRESH : EXTENT_PUNT;
        out->nbytes = least(run.nbytes, (UINT64_C(1) << map->cluster_bits) - in_cluster);
    } else if (!is_write && run.kind == L2_UNALLOCATED) {
        l2map_translate_backing(map, guest_offset, run.nbytes, out);
    }
}

static int extends(const struct extent *extent, const struct extent *after)
{
    if (after->kind != extent->kind || extent->kind == EXTENT_PUNT || extent->kind == EXTENT_FRESH)
        return 0;
    return extent->kind == EXTENT_ZERO ||
           (after->slot == extent->slot && after->host_offset == extent->host_offset + extent->nbytes);
}

void l2map_translate(void *context, uint64_t guest_offset, uint64_t nbytes, int is_write, struct extent *out)
{
    struct l2map *map = context;
    struct extent after;

    if (guest_offset >= map->size || nbytes > map->size - guest_offset) {
        memset(out, 0, sizeof(*out));
        out->nbytes = nbytes;
        return;
    }
    translate_run(map, guest_offset, nbytes, is_write, out);
    while (out->nbytes < nbytes && out->kind != EXTENT_PUNT) {
        translate_run(map, guest_offset + out->nbytes, nbytes - out->nbytes, is_write, &after);
        if (!extends(out, &after))
            break;
        out->nbytes += after.nbytes;
    }
}

void rawmap_translate(void *context, uint64_t guest_offset, uint64_t nbytes, int is_write, struct extent *out)
{
    const struct rawmap *map = context;

    memset(out, 0, sizeof(*out));
    out->nbytes = nbytes;
    if (guest_offset >= map->size || nbytes > map->size - guest_offset)
        return;
    if (map->slot != SLOT_UNKNOWN && (!is_write || map->writable)) {
        out->kind = EXTENT_DATA;
        out->slot = map->slot;
        out->host_offset = guest_offset;
    }
}

uintptr_t l2map_translate_address(void)
{
    return (uintptr_t)l2map_translate;
}

uintptr_t rawmap_translate_address(void)
{
    return (uintptr_t)rawmap_translate;
}
