/* Discards and zeros: entries of whole clusters that come to say zeros, and host clusters that go to the reaper.
 *
 * Only what is one change of one table is done here: the slice is in memory and the
 * file says the same, nobody holds the clusters. Everything else is Python's, as is
 * what frees a cluster while the reaper rests: it wakes it.
 */
#include <endian.h>
#include <errno.h>
#include <string.h>

#include "qcow2/plane/l2map.h"
#include "qcow2/plane/space.h"
#include "ring/assertion.h"

/* What becomes of the entries of a range. */
struct clearing {
    uint32_t nfreed; /* clusters, noted behind those that are freed */
    uint32_t nentries;
    int changes;
    uint64_t words[1 << MAX_SLICE_BITS]; /* of the entries */
};

void l2map_set_freed(struct l2map *map, struct freed *freed)
{
    map->freed = freed;
}

uint64_t l2map_clears(const struct l2map *map)
{
    return map->clears;
}

/* Narrow the range to the clusters, or subclusters, that it covers; the disk's last one may be partial. */
static void narrow(const struct l2map *map, uint64_t *start, uint64_t *end)
{
    uint64_t in_unit = (UINT64_C(1) << map->format.subcluster_bits) - 1;

    *start = (*start + in_unit) & ~in_unit;
    if (*end != map->size)
        *end &= ~in_unit;
}

int l2map_can_say_zeros(const struct l2map *map)
{
    return map->format.version >= 3 || !map->has_backing;
}

/* The same, and keep its cluster, which takes the flag. */
static int can_say_how(const struct l2map *map, enum extent_clearing how)
{
    return l2map_can_say_zeros(map) && (map->format.version >= 3 || how != EXTENT_KEEP);
}

/* Whether the entries from cluster first to last, all in one slice, are what the file says and nobody's. */
static int is_simple(struct l2map *map, uint64_t first, uint64_t last)
{
    uint64_t slice = first >> map->slice_bits;

    return map->freed && map->writable && (!map->format.is_identity || map->untouched) && map->slot != SLOT_UNKNOWN &&
           last >> map->slice_bits == slice && l2map_find(map, slice) != NONE && !l2map_is_claimed(map, slice) && !l2map_is_locked(map, first, last) &&
           !l2map_holds(map, first, last);
}

static int free_cluster(struct freed *freed, struct clearing *clearing, uint64_t host_cluster)
{
    if (!freed->is_open || freed->count + clearing->nfreed == FREED_CLUSTERS)
        return -EAGAIN;
    ASSERT(freed->count + clearing->nfreed < FREED_CLUSTERS);
    freed->clusters[freed->count + clearing->nfreed++] = host_cluster;
    return 0;
}

/* Add the entry that lets the cluster of `run` read as zeros. -> 0, or -EAGAIN. */
static int add_entry(struct l2map *map, const struct l2_run *run, enum extent_clearing how, struct clearing *clearing)
{
    const struct entry_format *format = &map->format;
    struct entry entry = run->entry;

    if (run->kind == L2_UNALLOCATED && map->has_backing) {
        entry = entry_zeros(format);
    } else if (run->kind == L2_DATA || run->kind == L2_ZERO_ALLOCATED) {
        if (how == EXTENT_KEEP && !run->copied)
            return -EAGAIN;
        if (how != EXTENT_KEEP && map->format.is_identity) /* the space is given back at once */
            return -EAGAIN;
        if (how != EXTENT_KEEP && free_cluster(map->freed, clearing, run->host_offset >> map->cluster_bits) < 0)
            return -EAGAIN;
        entry = how == EXTENT_KEEP ? entry_zeroed(format, entry, 0, 0) : entry_zeros(format);
    } else if (run->kind != L2_ZERO_PLAIN && run->kind != L2_UNALLOCATED) {
        return -EAGAIN;
    }
    clearing->changes |= !entry_is_same(entry, run->entry);
    entry_put(format, clearing->words, clearing->nentries++, entry);
    return 0;
}

/* Add the entry of a cluster with subclusters, of which those from start to end come to read as zeros. -> 0, or -EAGAIN. */
static int add_parts(struct l2map *map, uint64_t start, uint64_t end, enum extent_clearing how,
                     struct clearing *clearing)
{
    const struct entry_format *format = &map->format;
    uint64_t cluster_start = start >> map->cluster_bits << map->cluster_bits;
    uint32_t first = (uint32_t)((start - cluster_start) >> format->subcluster_bits);
    uint32_t last = (uint32_t)((end - cluster_start - 1) >> format->subcluster_bits);
    struct entry entry;
    struct l2_run run;
    int has_cluster;

    l2map_describe(map, start, 1, &run);
    has_cluster = entry_has_cluster(format, run.entry);
    if (run.kind == L2_BAD || run.kind == L2_COMPRESSED || (has_cluster && !run.copied))
        return -EAGAIN;
    if (how != EXTENT_KEEP && has_cluster && format->is_identity) /* the space is given back at once */
        return -EAGAIN;
    entry = entry_zeroed(format, run.entry, first, end == map->size ? ENTRY_SUBCLUSTERS - 1 : last);
    if (!map->has_backing && !has_cluster)
        entry = run.entry; /* all of it reads as zeros */
    if (how != EXTENT_KEEP && has_cluster && !entry_data_bits(entry)) {
        if (free_cluster(map->freed, clearing, entry_host_offset(entry) >> map->cluster_bits) < 0)
            return -EAGAIN;
        entry = entry_without_cluster(entry);
    }
    clearing->changes |= !entry_is_same(entry, run.entry);
    entry_put(format, clearing->words, clearing->nentries++, entry);
    return 0;
}

static int gather(struct l2map *map, uint64_t start, uint64_t end, enum extent_clearing how, struct clearing *clearing)
{
    struct l2_run run;

    clearing->nfreed = clearing->nentries = clearing->changes = 0;
    for (uint64_t next; map->format.word_bits && start < end; start = next) {
        next = least(end, ((start >> map->cluster_bits) + 1) << map->cluster_bits);
        if (add_parts(map, start, next, how, clearing) < 0)
            return -EAGAIN;
    }
    for (; start < end; start += run.nbytes) {
        l2map_describe(map, start, least(end - start, UINT64_C(1) << map->cluster_bits), &run);
        if (add_entry(map, &run, how, clearing) < 0)
            return -EAGAIN;
    }
    return 0;
}

/* Let the entries from `cluster` on be those, in the file and then here. */
static int write_entries(struct l2map *map, uint64_t cluster, const struct clearing *clearing,
                         struct extent_writer *writer)
{
    uint64_t in_file[1 << MAX_SLICE_BITS], host_offset = l2map_table(map, cluster) + l2map_in_table(map, cluster);
    uint32_t nwords = clearing->nentries << map->format.word_bits;
    int result;

    for (uint32_t i = 0; i < nwords; i++)
        in_file[i] = htobe64(clearing->words[i]);
    result = writer->write(writer, map->slot, host_offset, in_file, nwords * (uint32_t)sizeof(*in_file));
    if (result == 0)
        l2map_update(map, cluster << map->cluster_bits, clearing->words, clearing->nentries);
    return result;
}

int l2map_clear(void *context, uint64_t guest_offset, uint64_t nbytes, enum extent_clearing how,
                struct extent_writer *writer)
{
    struct l2map *map = context;
    uint64_t start = guest_offset, end = guest_offset + nbytes, first;
    struct clearing clearing;
    int result;

    narrow(map, &start, &end);
    if (!can_say_how(map, how) || (how != EXTENT_DISCARD && (start != guest_offset || end != guest_offset + nbytes)))
        return -EAGAIN;
    if (l2map_mark(map, guest_offset, nbytes) < 0)
        return -EAGAIN;
    if (start >= end)
        return 0;
    first = start >> map->cluster_bits;
    if (!l2map_private_table(map, first) || !is_simple(map, first, (end - 1) >> map->cluster_bits) ||
        gather(map, start, end, how, &clearing) < 0)
        return -EAGAIN;
    if (!clearing.changes)
        return 0;
    result = write_entries(map, first, &clearing, writer);
    if (result == 0) {
        map->freed->count += clearing.nfreed;
        map->clears++;
        return 0;
    }
    if (result == -EAGAIN || lacks_space(result))
        return -EAGAIN; /* the entries are as they were */
    return l2map_fail(map, result); /* nobody knows what they are */
}
