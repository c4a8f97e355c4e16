/* Discards: entries of whole clusters that become zeros, and host clusters that go to the reaper.
 *
 * Only what is one change of one table is done here: the slice is in memory and the
 * file says the same, nobody holds the clusters, and what they show is told by their
 * entries alone. Everything else is Python's, as is the first discard while the
 * reaper rests: it wakes it.
 */
#include <endian.h>
#include <errno.h>
#include <string.h>

#include "qcow2/l2map.h"

void l2map_set_freed(struct l2map *map, struct freed *freed)
{
    map->freed = freed;
}

/* Narrow the range to the clusters that it covers; the disk's last one may be partial. */
static void narrow(const struct l2map *map, uint64_t *start, uint64_t *end)
{
    uint64_t in_cluster = (UINT64_C(1) << map->cluster_bits) - 1;

    *start = (*start + in_cluster) & ~in_cluster;
    if (*end != map->size)
        *end &= ~in_cluster;
}

/* Whether the entries from cluster first to last, all in one slice, are what the file says and nobody's. */
static int is_simple(struct l2map *map, uint64_t first, uint64_t last)
{
    uint64_t slice = first >> map->slice_bits;

    return map->freed && map->freed->is_open && map->writable && map->slot != SLOT_UNKNOWN &&
           (map->version >= 3 || !map->has_backing) && last >> map->slice_bits == slice &&
           l2map_find(map, slice) != NONE && !l2map_is_claimed(map, slice) && !l2map_is_locked(map, first, last);
}

/* Add the host clusters of the range to those that are freed, but for `count`. -> how many; -EAGAIN: only Python can tell. */
static int gather(struct l2map *map, uint64_t start, uint64_t end)
{
    struct freed *freed = map->freed;
    struct l2_run run;
    int gathered = 0;

    for (; start < end; start += run.nbytes) {
        l2map_describe(map, start, end - start, &run);
        if (run.kind == L2_ZERO_PLAIN || (run.kind == L2_UNALLOCATED && !map->has_backing))
            continue;
        if (run.kind != L2_DATA && run.kind != L2_ZERO_ALLOCATED)
            return -EAGAIN;
        for (uint64_t ahead = 0; ahead < run.nbytes; ahead += UINT64_C(1) << map->cluster_bits) {
            if (freed->count + gathered == FREED_CLUSTERS)
                return -EAGAIN;
            freed->clusters[freed->count + gathered++] = (run.host_offset + ahead) >> map->cluster_bits;
        }
    }
    return gathered;
}

/* Let the entries from cluster first to last say zeros, in the file and then here. */
static int write_zero_entries(struct l2map *map, uint64_t table, uint64_t first, uint64_t last,
                              struct extent_writer *writer)
{
    uint64_t entries[1 << MAX_SLICE_BITS], count = last - first + 1;
    uint64_t zero = map->version >= 3 ? FLAG_ZERO : 0;
    uint64_t in_table = first & ((UINT64_C(1) << (map->cluster_bits - 3)) - 1);
    int result;

    for (uint64_t i = 0; i < count; i++)
        entries[i] = htobe64(zero);
    result = writer->write(writer, map->slot, table + in_table * sizeof(*entries), entries, count * sizeof(*entries));
    if (result < 0)
        return result;
    for (uint64_t i = 0; i < count; i++)
        entries[i] = zero;
    l2map_update(map, first << map->cluster_bits, entries, count);
    return 0;
}

int l2map_clear(void *context, uint64_t guest_offset, uint64_t nbytes, int is_hint, struct extent_writer *writer)
{
    struct l2map *map = context;
    uint64_t start = guest_offset, end = guest_offset + nbytes, first, last, table;
    int gathered, result;

    narrow(map, &start, &end);
    if (!is_hint && (start != guest_offset || end != guest_offset + nbytes))
        return -EAGAIN;
    if (start >= end)
        return 0;
    first = start >> map->cluster_bits;
    last = (end - 1) >> map->cluster_bits;
    table = l2map_private_table(map, first);
    if (!table || !is_simple(map, first, last))
        return -EAGAIN;
    gathered = gather(map, start, end);
    if (gathered <= 0)
        return gathered;
    result = write_zero_entries(map, table, first, last, writer);
    if (result == 0) {
        map->freed->count += gathered;
        map->freed->writes++;
        return 0;
    }
    if (result == -EAGAIN || result == -ENOSPC || result == -EDQUOT)
        return -EAGAIN; /* the entries are as they were */
    map->stock->error = -result; /* nobody knows what they are */
    map->writable = 0;
    return result;
}
