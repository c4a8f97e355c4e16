/* The extent map: answers from the slices in memory, and from the backing image's map where nothing is allocated. */
#include "qcow2/plane/l2map.h"
#include "ring/assertion.h"

#include <string.h>

/* What shows through an unallocated run: the backing image's answer, clipped; zeros past its end or without one. */
void l2map_translate_backing(const struct l2map *map, uint64_t guest_offset, uint64_t nbytes,
                             struct extent_reader *reader, struct extent *out)
{
    memset(out, 0, sizeof(*out));
    out->nbytes = nbytes;
    if (!map->has_backing || guest_offset >= map->backing_size) {
        out->kind = EXTENT_ZERO;
        return;
    }
    if (map->backing_translate)
        map->backing_translate(map->backing_context, guest_offset, least(nbytes, map->backing_size - guest_offset), 0,
                               reader, out);
}

void l2map_set_dirty(struct l2map *map, struct dirty_bits *dirty)
{
    map->dirty = dirty;
}

int l2map_mark(struct l2map *map, uint64_t guest_offset, uint64_t nbytes)
{
    return map->dirty ? dirty_bits_set(map->dirty, guest_offset, nbytes) : 0;
}

void l2map_set_cipher(struct l2map *map, const struct extent_cipher *cipher)
{
    map->cipher = cipher;
}

void l2map_claim(struct l2map *map, uint64_t slice)
{
    ASSERT(map->claims[slice & (CLAIMS - 1)] < UINT32_MAX);
    map->claims[slice & (CLAIMS - 1)]++;
}

void l2map_unclaim(struct l2map *map, uint64_t slice)
{
    ASSERT(map->claims[slice & (CLAIMS - 1)]);
    map->claims[slice & (CLAIMS - 1)]--;
}

uint64_t l2map_loads(const struct l2map *map)
{
    return map->loads;
}

/* Whether a link in the slice waits that Python has not heard of, and therefore not claimed the slice for. */
static int has_new_link(const struct l2map *map, uint64_t slice)
{
    for (uint32_t i = 0; map->log && i < map->log->nlinks; i++)
        if (map->log->links[i].cluster >> map->slice_bits == slice)
            return 1;
    return 0;
}

int l2map_is_claimed(const struct l2map *map, uint64_t slice)
{
    return map->claims[slice & (CLAIMS - 1)] || has_new_link(map, slice);
}

/* Whether the file says what there is to say about the slice, and nobody is writing that: who does has locked it. */
static int may_load(const struct l2map *map, uint64_t slice)
{
    uint64_t first = slice << map->slice_bits, last = first + (UINT64_C(1) << map->slice_bits) - 1;

    return map->slot != SLOT_UNKNOWN && !l2map_is_claimed(map, slice) && !l2map_is_locked(map, first, last);
}

/* Bring the slice, which is not in the cache, there if that needs neither Python nor the disk. -> whether it is. */
static int load(struct l2map *map, uint64_t slice, struct extent_reader *reader)
{
    uint64_t first = slice << map->slice_bits, table = l2map_table(map, first);
    uint8_t data[sizeof(uint64_t) << MAX_SLICE_BITS];

    if (!reader || !table || !may_load(map, slice) ||
        reader->read(reader, map->slot, table + l2map_in_table(map, first), data,
                     (uint32_t)(slice_nwords(map) * sizeof(uint64_t))))
        return 0;
    l2map_load(map, slice, data);
    map->loads++;
    return 1;
}

/* Whether a write to the run may find a place: in a new cluster, or in a part of its own that is no data yet; in a file
 * of its own data has no choice. */
static int may_be_fresh(const struct l2map *map, const struct l2_run *run)
{
    if (map->format.word_bits && run->copied && (run->kind == L2_UNALLOCATED || run->kind == L2_ZERO_ALLOCATED))
        return 1;
    return (!run->host_offset || map->format.is_identity) &&
           (run->kind == L2_UNALLOCATED || run->kind == L2_ZERO_PLAIN);
}

static void translate_run(struct l2map *map, uint64_t guest_offset, uint64_t nbytes, int is_write,
                          struct extent_reader *reader, struct extent *out)
{
    struct l2_run run;

    l2map_describe(map, guest_offset, nbytes, &run);
    if (run.kind == L2_MISS && load(map, guest_offset >> map->cluster_bits >> map->slice_bits, reader))
        l2map_describe(map, guest_offset, nbytes, &run);
    memset(out, 0, sizeof(*out));
    out->nbytes = run.nbytes;
    if (run.kind == L2_DATA && map->data_slot != SLOT_UNKNOWN && (!is_write || (map->writable && run.copied))) {
        out->kind = EXTENT_DATA;
        out->slot = map->data_slot;
        out->host_offset = run.host_offset;
        out->cipher = map->cipher;
    } else if (!is_write && (run.kind == L2_ZERO_PLAIN || run.kind == L2_ZERO_ALLOCATED)) {
        out->kind = EXTENT_ZERO;
    } else if (is_write && may_be_fresh(map, &run)) {
        uint64_t in_cluster = guest_offset & ((UINT64_C(1) << map->cluster_bits) - 1);

        out->kind = map->stock && map->writable && (!map->format.is_identity || map->untouched) ? EXTENT_FRESH : EXTENT_PUNT;
        out->nbytes = least(run.nbytes, (UINT64_C(1) << map->cluster_bits) - in_cluster);
    } else if (!is_write && run.kind == L2_UNALLOCATED) {
        l2map_translate_backing(map, guest_offset, run.nbytes, reader, out);
    }
}

static int extends(const struct extent *extent, const struct extent *after)
{
    if (after->kind != extent->kind || extent->kind == EXTENT_PUNT || extent->kind == EXTENT_FRESH)
        return 0;
    return extent->kind == EXTENT_ZERO ||
           (after->slot == extent->slot && after->cipher == extent->cipher &&
            after->host_offset == extent->host_offset + extent->nbytes);
}

void l2map_translate(void *context, uint64_t guest_offset, uint64_t nbytes, int is_write, struct extent_reader *reader,
                     struct extent *out)
{
    struct l2map *map = context;
    struct extent after;

    if (guest_offset >= map->size || nbytes > map->size - guest_offset) {
        memset(out, 0, sizeof(*out));
        out->nbytes = nbytes;
        return;
    }
    translate_run(map, guest_offset, nbytes, is_write, reader, out);
    while (out->nbytes < nbytes && out->kind != EXTENT_PUNT) {
        translate_run(map, guest_offset + out->nbytes, nbytes - out->nbytes, is_write, reader, &after);
        if (!extends(out, &after))
            break;
        out->nbytes += after.nbytes;
    }
    if (is_write && out->kind != EXTENT_PUNT && l2map_mark(map, guest_offset, out->nbytes) < 0)
        *out = (struct extent){.kind = EXTENT_PUNT, .nbytes = nbytes};
}

void rawmap_translate(void *context, uint64_t guest_offset, uint64_t nbytes, int is_write, struct extent_reader *reader,
                      struct extent *out)
{
    const struct rawmap *map = context;

    memset(out, 0, sizeof(*out));
    out->nbytes = nbytes;
    if (guest_offset >= map->size || nbytes > map->size - guest_offset)
        return;
    if (map->slot != SLOT_UNKNOWN && (!is_write || map->writable)) {
        out->kind = EXTENT_DATA;
        out->slot = map->slot;
        out->host_offset = map->start + guest_offset;
        out->cipher = map->cipher;
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
