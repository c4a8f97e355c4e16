/* See l2cache.h; what answers the worker is in translate.c, fresh.c and clear.c. Slots are found through chained hash
 * buckets and given up by the CLOCK rule. */
#include "qcow2/plane/l2map.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct l2map *l2map_create(uint32_t cluster_bits, uint32_t version, uint64_t size, uint32_t nslots)
{
    struct l2map *map = calloc(1, sizeof(*map));

    if (!map)
        return NULL;
    map->cluster_bits = cluster_bits;
    map->slice_bits = cluster_bits - 3 < MAX_SLICE_BITS ? cluster_bits - 3 : MAX_SLICE_BITS;
    map->version = version;
    map->slot = SLOT_UNKNOWN;
    if (l2map_resize(map, size, nslots) < 0) {
        free(map);
        return NULL;
    }
    return map;
}

static void free_slots(struct l2map *map)
{
    free(map->entries);
    free(map->slice_of);
    free(map->next);
    free(map->buckets);
    free(map->referenced);
}

int l2map_resize(struct l2map *map, uint64_t size, uint32_t nslots)
{
    struct l2map resized = *map;
    uint32_t nbuckets = 16;

    while (nbuckets < nslots)
        nbuckets *= 2;
    resized.size = size;
    resized.nslots = nslots;
    resized.nused = 0;
    resized.hand = 0;
    resized.bucket_mask = nbuckets - 1;
    resized.entries = calloc((size_t)nslots << map->slice_bits, sizeof(*map->entries));
    resized.slice_of = calloc(nslots, sizeof(*map->slice_of));
    resized.next = calloc(nslots, sizeof(*map->next));
    resized.buckets = malloc(nbuckets * sizeof(*map->buckets));
    resized.referenced = calloc(nslots, sizeof(*map->referenced));
    if (!resized.entries || !resized.slice_of || !resized.next || !resized.buckets || !resized.referenced) {
        free_slots(&resized);
        return -ENOMEM;
    }
    memset(resized.buckets, 0xff, nbuckets * sizeof(*resized.buckets));
    free_slots(map);
    *map = resized;
    return 0;
}

void l2map_destroy(struct l2map *map)
{
    free_slots(map);
    free(map);
}

void l2map_set_l1(struct l2map *map, const uint64_t *l1, uint64_t nentries)
{
    map->l1 = l1;
    map->l1_nentries = nentries;
}

void l2map_set_metadata(struct l2map *map, const uint64_t *clusters, size_t nclusters)
{
    map->metadata = clusters;
    map->nmetadata = nclusters;
}

void l2map_set_file_end(struct l2map *map, uint64_t file_end)
{
    map->file_end = file_end;
}

void l2map_set_file(struct l2map *map, uint32_t slot, int writable)
{
    map->slot = slot;
    map->writable = writable;
}

int l2map_fail(struct l2map *map, int result)
{
    map->error = -result;
    map->writable = 0;
    return result;
}

int l2map_error(const struct l2map *map)
{
    return map->error;
}

void l2map_set_backing(struct l2map *map, int has_backing, extent_translate translate, void *context, uint64_t size)
{
    map->has_backing = has_backing;
    map->backing_translate = translate;
    map->backing_context = context;
    map->backing_size = size;
}

static uint32_t *bucket_of(struct l2map *map, uint64_t slice)
{
    return &map->buckets[(slice * UINT64_C(0x9e3779b97f4a7c15) >> 32) & map->bucket_mask];
}

uint32_t l2map_find(struct l2map *map, uint64_t slice)
{
    uint32_t slot = *bucket_of(map, slice);

    while (slot != NONE && map->slice_of[slot] != slice)
        slot = map->next[slot];
    if (slot != NONE)
        map->referenced[slot] = 1;
    return slot;
}

static void unchain(struct l2map *map, uint32_t slot)
{
    uint32_t *link = bucket_of(map, map->slice_of[slot]);

    while (*link != slot)
        link = &map->next[*link];
    *link = map->next[slot];
}

static uint32_t take_slot(struct l2map *map)
{
    uint32_t slot;

    if (map->nused < map->nslots)
        return map->nused++;
    while (map->referenced[map->hand]) {
        map->referenced[map->hand] = 0;
        map->hand = (map->hand + 1) % map->nslots;
    }
    slot = map->hand;
    map->hand = (map->hand + 1) % map->nslots;
    unchain(map, slot);
    return slot;
}

void l2map_load(struct l2map *map, uint64_t slice, const uint8_t *data)
{
    size_t nentries = (size_t)1 << map->slice_bits;
    uint32_t slot = l2map_find(map, slice);
    uint64_t *entries;

    if (slot == NONE) {
        uint32_t *bucket = bucket_of(map, slice);

        slot = take_slot(map);
        map->slice_of[slot] = slice;
        map->next[slot] = *bucket;
        *bucket = slot;
        map->referenced[slot] = 1;
    }
    entries = slice_entries(map, slot);
    memcpy(entries, data, nentries * sizeof(*entries));
    for (size_t i = 0; i < nentries; i++)
        entries[i] = be64toh(entries[i]);
}

void l2map_update(struct l2map *map, uint64_t guest_offset, const uint64_t *entries, size_t n)
{
    uint64_t cluster = guest_offset >> map->cluster_bits;
    uint32_t slot = l2map_find(map, cluster >> map->slice_bits);

    if (slot != NONE)
        memcpy(slice_entries(map, slot) + (cluster & ((UINT64_C(1) << map->slice_bits) - 1)), entries,
               n * sizeof(*entries));
}

static int holds_metadata(const struct l2map *map, uint64_t first_cluster, uint64_t last_cluster)
{
    size_t low = 0, high = map->nmetadata;

    while (low < high) {
        size_t middle = low + (high - low) / 2;

        if (map->metadata[middle] < first_cluster)
            low = middle + 1;
        else
            high = middle;
    }
    return low < map->nmetadata && map->metadata[low] <= last_cluster;
}

static void describe_compressed(const struct l2map *map, uint64_t entry, struct l2_run *run)
{
    uint32_t offset_bits = 62 - (map->cluster_bits - 8);
    uint64_t offset = entry & ((UINT64_C(1) << offset_bits) - 1);
    uint64_t nsectors = ((entry & ~(FLAG_COPIED | FLAG_COMPRESSED)) >> offset_bits) + 1;
    uint64_t last = (offset & ~UINT64_C(511)) + nsectors * 512 - 1;

    run->kind = L2_COMPRESSED;
    run->copied = 0;
    run->host_offset = offset;
    if (offset >= map->file_end || holds_metadata(map, offset >> map->cluster_bits, last >> map->cluster_bits))
        run->kind = L2_BAD;
}

/* Classify one entry. A set reserved bit, a cluster that is not aligned, does not exist or is metadata makes it bad. */
static void describe_entry(const struct l2map *map, uint64_t entry, struct l2_run *run)
{
    uint64_t offset = entry & OFFSET_MASK;
    uint64_t cluster = offset >> map->cluster_bits;

    run->entry = entry;
    if (entry & FLAG_COMPRESSED) {
        describe_compressed(map, entry, run);
        return;
    }
    run->copied = entry >> 63;
    run->host_offset = offset;
    if (entry & FLAG_ZERO)
        run->kind = offset ? L2_ZERO_ALLOCATED : L2_ZERO_PLAIN;
    else
        run->kind = offset ? L2_DATA : L2_UNALLOCATED;
    if ((entry & L2_RESERVED) || (map->version < 3 && (entry & FLAG_ZERO)))
        run->kind = L2_BAD;
    else if (offset && ((offset & ((UINT64_C(1) << map->cluster_bits) - 1)) || offset >= map->file_end ||
                        holds_metadata(map, cluster, cluster)))
        run->kind = L2_BAD;
}

/* Does the cluster `ahead` clusters after the first of `run` go on with it? */
static int continues(const struct l2map *map, const struct l2_run *run, const struct l2_run *after, uint64_t ahead)
{
    if (after->kind != run->kind)
        return 0;
    switch (run->kind) {
    case L2_UNALLOCATED:
    case L2_ZERO_PLAIN:
        return 1;
    case L2_DATA:
    case L2_ZERO_ALLOCATED:
        return after->copied == run->copied && after->host_offset == run->host_offset + (ahead << map->cluster_bits);
    default:
        return 0;
    }
}

uint64_t l2map_table(const struct l2map *map, uint64_t cluster)
{
    uint64_t l1_index = cluster >> (map->cluster_bits - 3), entry, offset;

    if (l1_index >= map->l1_nentries)
        return 0;
    entry = map->l1[l1_index];
    offset = entry & OFFSET_MASK;
    if (entry & ~(OFFSET_MASK | FLAG_COPIED))
        return 0;
    return offset & ((UINT64_C(1) << map->cluster_bits) - 1) || offset >= map->file_end ? 0 : offset;
}

uint64_t l2map_private_table(const struct l2map *map, uint64_t cluster)
{
    uint64_t table = l2map_table(map, cluster);

    return table && map->l1[cluster >> (map->cluster_bits - 3)] & FLAG_COPIED ? table : 0;
}

static int has_table(const struct l2map *map, uint64_t l1_index)
{
    return l1_index < map->l1_nentries && (map->l1[l1_index] & OFFSET_MASK);
}

/* Without L2 tables everything up to the next one's start is unallocated. Returns 0 if there is a table. */
static int describe_missing_table(const struct l2map *map, uint64_t guest_offset, uint64_t nbytes, struct l2_run *out)
{
    uint32_t table_bits = map->cluster_bits + map->cluster_bits - 3;
    uint64_t l1_index = guest_offset >> table_bits;

    if (has_table(map, l1_index))
        return 0;
    while (((l1_index + 1) << table_bits) - guest_offset < nbytes && !has_table(map, l1_index + 1))
        l1_index++;
    memset(out, 0, sizeof(*out));
    out->kind = L2_UNALLOCATED;
    out->nbytes = least(nbytes, ((l1_index + 1) << table_bits) - guest_offset);
    return 1;
}

void l2map_describe(struct l2map *map, uint64_t guest_offset, uint64_t nbytes, struct l2_run *out)
{
    uint64_t cluster = guest_offset >> map->cluster_bits;
    uint64_t in_cluster = guest_offset & ((UINT64_C(1) << map->cluster_bits) - 1);
    uint64_t nentries = UINT64_C(1) << map->slice_bits;
    uint64_t index = cluster & (nentries - 1);
    uint64_t covered = (nentries - index) << map->cluster_bits;
    uint64_t ahead = 1;
    const uint64_t *entries;
    uint32_t slot;

    if (describe_missing_table(map, guest_offset, nbytes, out))
        return;
    memset(out, 0, sizeof(*out));
    nbytes = least(nbytes, covered - in_cluster);
    out->nbytes = nbytes;
    slot = l2map_find(map, cluster >> map->slice_bits);
    if (slot == NONE)
        return;
    entries = slice_entries(map, slot) + index;
    describe_entry(map, entries[0], out);
    while ((ahead << map->cluster_bits) < in_cluster + nbytes) {
        struct l2_run after;

        describe_entry(map, entries[ahead], &after);
        if (!continues(map, out, &after, ahead))
            break;
        ahead++;
    }
    out->nbytes = least(nbytes, (ahead << map->cluster_bits) - in_cluster);
    if (out->kind == L2_DATA || out->kind == L2_ZERO_ALLOCATED)
        out->host_offset += in_cluster;
}
