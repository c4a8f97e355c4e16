/* Places for writes that find nothing: a cluster of the stock, and the L2 entry that will name it.
 *
 * This decides nothing. Python filled the stock with clusters that plain data may
 * be written to and linked without any barrier, and only such writes are served:
 * the old content is zeros, the table is the image's alone, nobody holds the
 * cluster. Everything else is Python's.
 */
#include <endian.h>
#include <errno.h>
#include <string.h>

#include "qcow2/l2map.h"

void l2map_set_stock(struct l2map *map, struct stock *stock)
{
    map->stock = stock;
}

void l2map_lock(struct l2map *map, uint64_t first, uint64_t last)
{
    struct range_locks *locks = &map->locks;

    if (locks->count == RANGE_LOCKS) {
        locks->uncharted++;
        return;
    }
    locks->first[locks->count] = first;
    locks->last[locks->count++] = last;
}

void l2map_unlock(struct l2map *map, uint64_t first, uint64_t last)
{
    struct range_locks *locks = &map->locks;

    for (uint32_t i = 0; i < locks->count; i++) {
        if (locks->first[i] == first && locks->last[i] == last) {
            locks->first[i] = locks->first[--locks->count];
            locks->last[i] = locks->last[locks->count];
            return;
        }
    }
    locks->uncharted--;
}

static int is_locked(const struct l2map *map, uint64_t cluster)
{
    if (map->locks.uncharted)
        return 1;
    for (uint32_t i = 0; i < map->locks.count; i++)
        if (map->locks.first[i] <= cluster && cluster <= map->locks.last[i])
            return 1;
    return 0;
}

/* Whether the guest sees zeros in the whole cluster. */
static int shows_zeros(struct l2map *map, uint64_t cluster)
{
    uint64_t start = cluster << map->cluster_bits, nbytes = UINT64_C(1) << map->cluster_bits;
    struct l2_run run;
    struct extent under;

    if (nbytes > map->size - start)
        nbytes = map->size - start;
    l2map_describe(map, start, nbytes, &run);
    if (run.kind == L2_ZERO_PLAIN)
        return 1;
    if (run.kind != L2_UNALLOCATED)
        return 0;
    for (uint64_t done = 0; done < nbytes; done += under.nbytes) {
        memset(&under, 0, sizeof(under));
        l2map_translate_backing(map, start + done, nbytes - done, &under);
        if (under.kind != EXTENT_ZERO || !under.nbytes)
            return 0;
    }
    return 1;
}

/* -> host offset of the private L2 table of the cluster; 0: there is none, or its L1 entry cannot be true. */
static uint64_t private_table(const struct l2map *map, uint64_t cluster)
{
    uint64_t l1_index = cluster >> (map->cluster_bits - 3), entry, offset;

    if (l1_index >= map->l1_nentries)
        return 0;
    entry = map->l1[l1_index];
    offset = entry & OFFSET_MASK;
    if (!(entry & FLAG_COPIED) || entry & ~(OFFSET_MASK | FLAG_COPIED))
        return 0;
    return offset & ((UINT64_C(1) << map->cluster_bits) - 1) || offset >= map->file_end ? 0 : offset;
}

/* Once when the stock runs low one write is Python's, so that it comes by and sees to more. */
static int is_wanted_by_python(struct stock *stock)
{
    if (stock->left > stock->low)
        return 0;
    stock->low = 0;
    return stock->left != 0;
}

static int take(void *context, uint64_t guest_offset, uint64_t nbytes, struct extent_place *out)
{
    struct l2map *map = context;
    struct stock *stock = map->stock;
    uint64_t cluster = guest_offset >> map->cluster_bits, in_cluster = guest_offset - (cluster << map->cluster_bits);
    uint64_t table = private_table(map, cluster), host_cluster, entry;

    if (!stock || !stock->is_open || stock->nspoiled == STOCK_SPOILED || !table ||
        !map->writable || map->slot == SLOT_UNKNOWN || in_cluster + nbytes > UINT64_C(1) << map->cluster_bits ||
        is_locked(map, cluster) || l2map_find(map, cluster >> map->slice_bits) == NONE || !shows_zeros(map, cluster) ||
        is_wanted_by_python(stock) || !stock_take(stock, 1, &host_cluster))
        return -EAGAIN;
    *out = (struct extent_place){
        .slot = map->slot,
        .entry_nbytes = sizeof(out->entry),
        .host_offset = (host_cluster << map->cluster_bits) + in_cluster,
        .entry_offset = table + (cluster & ((UINT64_C(1) << (map->cluster_bits - 3)) - 1)) * sizeof(entry),
        .guest_offset = guest_offset,
    };
    entry = htobe64(host_cluster << map->cluster_bits | FLAG_COPIED);
    memcpy(out->entry, &entry, sizeof(entry));
    return 0;
}

static int settle(void *context, const struct extent_place *place, enum extent_outcome outcome, int error)
{
    struct l2map *map = context;
    struct stock *stock = map->stock;
    uint64_t host_cluster = place->host_offset >> map->cluster_bits;
    uint64_t entry = host_cluster << map->cluster_bits | FLAG_COPIED;

    if (outcome == EXTENT_LINKED) {
        stock->linked++;
        l2map_update(map, place->guest_offset, &entry, 1);
        return 0;
    }
    if (outcome == EXTENT_UNTOUCHED) {
        stock_put_back(stock, host_cluster);
        return 0;
    }
    stock->spoiled[stock->nspoiled++] = host_cluster;
    /* Without space an entry is as it was; after anything else nobody knows. */
    if (!error || error == -ENOSPC || error == -EDQUOT)
        return 0;
    stock->error = -error;
    map->writable = 0;
    return error;
}

static const struct extent_places places = {take, settle};

uintptr_t l2map_places_address(void)
{
    return (uintptr_t)&places;
}
