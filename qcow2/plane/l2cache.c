/* See l2cache.h; what answers the worker is in translate.c, fresh.c and clear.c. Slots are found through chained hash
 * buckets and given up by the CLOCK rule. */
#include "qcow2/plane/l2map.h"
#include "ring/assertion.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct l2map *l2map_create(const struct entry_format *format, uint64_t size, uint32_t nslots)
{
    struct l2map *map = calloc(1, sizeof(*map));

    if (!map)
        return NULL;
    map->format = *format;
    map->cluster_bits = format->cluster_bits;
    map->table_bits = format->cluster_bits - entry_format_bits(format);
    map->slice_bits = least(map->table_bits, MAX_SLICE_BITS - format->word_bits);
    map->slot = map->data_slot = SLOT_UNKNOWN;
    if (l2map_resize(map, size, nslots) == 0)
        return map;
    free(map);
    return NULL;
}

static void free_slots(struct l2map *map)
{
    free(map->words);
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
    resized.bucket_mask = nbuckets - 1;
    resized.words = calloc(nslots * slice_nwords(map), sizeof(*map->words));
    resized.slice_of = calloc(nslots, sizeof(*map->slice_of));
    resized.next = calloc(nslots, sizeof(*map->next));
    resized.buckets = malloc(nbuckets * sizeof(*map->buckets));
    resized.referenced = calloc(nslots, sizeof(*map->referenced));
    if (!resized.words || !resized.slice_of || !resized.next || !resized.buckets || !resized.referenced) {
        free_slots(&resized);
        if (!map->words)
            return -ENOMEM;
        resized = *map;
        resized.size = size;
    } else
        free_slots(map);
    resized.nused = resized.hand = 0;
    memset(resized.buckets, 0xff, (resized.bucket_mask + 1) * sizeof(*resized.buckets));
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
    if (!map->format.is_identity)
        map->data_slot = slot;
    map->writable = writable;
}

void l2map_set_data_file(struct l2map *map, uint32_t slot)
{
    ASSERT(map->format.is_identity);
    map->data_slot = slot;
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

/* A slice stays while it has an entry that is about to change: what is read of it meanwhile may be as it was before. */
static int is_pinned(const struct l2map *map, uint32_t slot)
{
    uint64_t first = map->slice_of[slot] << map->slice_bits;

    return l2map_holds(map, first, first + (UINT64_C(1) << map->slice_bits) - 1);
}

static uint32_t take_slot(struct l2map *map)
{
    uint32_t slot;

    if (map->nused < map->nslots)
        return map->nused++;
    ASSERT(map->nheld < map->nslots);
    while (map->referenced[map->hand] || is_pinned(map, map->hand)) {
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
    size_t nwords = slice_nwords(map);
    uint32_t slot = l2map_find(map, slice), *bucket = bucket_of(map, slice);
    uint64_t *words;

    if (slot == NONE) {
        slot = take_slot(map);
        map->slice_of[slot] = slice;
        map->next[slot] = *bucket;
        *bucket = slot;
    }
    map->referenced[slot] = data != NULL;
    words = slice_words(map, slot);
    if (data)
        memcpy(words, data, nwords * sizeof(*words));
    for (size_t i = 0; i < nwords; i++)
        words[i] = data ? be64toh(words[i]) : 0;
}

uint32_t l2map_used(const struct l2map *map, uint64_t *slices, uint32_t limit)
{
    uint32_t count = 0;

    for (uint32_t slot = 0; slot < map->nused && count < limit; slot++)
        if (map->referenced[slot])
            slices[count++] = map->slice_of[slot];
    return count;
}

static uint64_t in_slice(const struct l2map *map, uint64_t cluster)
{
    return cluster & ((UINT64_C(1) << map->slice_bits) - 1);
}

void l2map_update(struct l2map *map, uint64_t guest_offset, const uint64_t *words, size_t n)
{
    uint64_t cluster = guest_offset >> map->cluster_bits;
    uint32_t slot = l2map_find(map, cluster >> map->slice_bits);

    if (map->untouched && n)
        untouched_forget(map->untouched, cluster, cluster + n - 1);
    if (slot != NONE)
        memcpy(slice_words(map, slot) + (in_slice(map, cluster) << map->format.word_bits), words,
               (n << map->format.word_bits) * sizeof(*words));
}

struct entry l2map_entry(struct l2map *map, uint64_t cluster)
{
    uint32_t slot = l2map_find(map, cluster >> map->slice_bits);

    ASSERT(slot != NONE);
    return entry_of(&map->format, slice_words(map, slot), in_slice(map, cluster));
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

static void describe_compressed(const struct l2map *map, struct entry entry, struct l2_run *run)
{
    struct payload payload = entry_payload(&map->format, entry);
    uint64_t last = payload.host_offset + payload.nbytes - 1;

    run->kind = L2_COMPRESSED;
    run->copied = 0;
    run->host_offset = payload.host_offset;
    if (payload.host_offset >= map->file_end ||
        holds_metadata(map, payload.host_offset >> map->cluster_bits, last >> map->cluster_bits))
        run->kind = L2_BAD;
}

/* Whether the host cluster that a standard entry of the guest cluster names cannot be its own. */
static int is_misplaced(const struct l2map *map, struct entry entry, uint64_t guest_cluster)
{
    uint64_t offset = entry_host_offset(entry), cluster = offset >> map->cluster_bits;

    if (!entry_has_cluster(&map->format, entry))
        return 0;
    if (map->format.is_identity)
        return offset != guest_cluster << map->cluster_bits;
    return entry_is_askew(&map->format, entry) || offset >= map->file_end || holds_metadata(map, cluster, cluster);
}

/* Classify the entry of a guest cluster from `subcluster` on. What no image may hold makes it bad, as does a cluster
 * that is not aligned, does not exist or is metadata, and in a file of its own one that is not where the guest's is. */
static void describe_entry(const struct l2map *map, struct entry entry, uint64_t guest_cluster, uint32_t subcluster,
                           struct l2_run *run)
{
    uint64_t offset = entry_host_offset(entry);

    run->entry = entry;
    if (entry_is_compressed(entry)) {
        describe_compressed(map, entry, run);
        if (map->format.is_identity)
            run->kind = L2_BAD;
        return;
    }
    run->copied = entry_is_copied(entry);
    run->host_offset = offset;
    run->kind = entry_kind(&map->format, entry, subcluster);
    if (entry_is_bad(&map->format, entry) || is_misplaced(map, entry, guest_cluster))
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
        if (!run->host_offset)
            return !after->host_offset;
        /* fallthrough */
    case L2_DATA:
    case L2_ZERO_ALLOCATED:
        return after->copied == run->copied && after->host_offset == run->host_offset + (ahead << map->cluster_bits);
    default:
        return 0;
    }
}

uint64_t l2map_table(const struct l2map *map, uint64_t cluster)
{
    uint64_t l1_index = cluster >> map->table_bits, entry;

    if (l1_index >= map->l1_nentries)
        return 0;
    entry = map->l1[l1_index];
    return l1_entry_is_sound(&map->format, entry) && l1_entry_offset(entry) < map->file_end ? l1_entry_offset(entry) : 0;
}

uint64_t l2map_private_table(const struct l2map *map, uint64_t cluster)
{
    uint64_t table = l2map_table(map, cluster);

    return table && l1_entry_is_private(map->l1[cluster >> map->table_bits]) ? table : 0;
}

uint64_t l2map_in_table(const struct l2map *map, uint64_t cluster)
{
    return (cluster & ((UINT64_C(1) << map->table_bits) - 1)) << entry_format_bits(&map->format);
}

static int has_table(const struct l2map *map, uint64_t l1_index)
{
    return l1_index < map->l1_nentries && l1_entry_offset(map->l1[l1_index]);
}

/* Without L2 tables everything up to the next one's start is unallocated. Returns 0 if there is a table. */
static int describe_missing_table(const struct l2map *map, uint64_t guest_offset, uint64_t nbytes, struct l2_run *out)
{
    uint32_t table_bits = map->cluster_bits + map->table_bits;
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

/* Let `run`, which describes the first entry from `subcluster` on, be as long as it is one; the clusters that `words`
 * begin with end at `end`, counted from the first one's start. -> where it ends, counted likewise. */
static uint64_t extend(const struct l2map *map, const uint64_t *words, uint64_t cluster, uint32_t subcluster,
                       uint64_t end, const struct l2_run *run)
{
    const struct entry_format *format = &map->format;
    uint32_t whole = entry_subclusters(format), same = entry_same_kind(format, run->entry, subcluster);
    uint64_t ahead = 1;

    if (subcluster + same < whole || run->kind == L2_BAD)
        return run->kind == L2_BAD ? UINT64_C(1) << map->cluster_bits
                                   : (uint64_t)(subcluster + same) << format->subcluster_bits;
    while (ahead << map->cluster_bits < end) {
        struct l2_run after;

        describe_entry(map, entry_of(format, words, ahead), cluster + ahead, 0, &after);
        if (!continues(map, run, &after, ahead))
            break;
        same = entry_same_kind(format, after.entry, 0);
        if (same < whole)
            return (ahead << map->cluster_bits) + ((uint64_t)same << format->subcluster_bits);
        ahead++;
    }
    return ahead << map->cluster_bits;
}

void l2map_describe(struct l2map *map, uint64_t guest_offset, uint64_t nbytes, struct l2_run *out)
{
    uint64_t cluster = guest_offset >> map->cluster_bits;
    uint64_t in_cluster = guest_offset & ((UINT64_C(1) << map->cluster_bits) - 1);
    uint64_t index = in_slice(map, cluster);
    uint64_t covered = ((UINT64_C(1) << map->slice_bits) - index) << map->cluster_bits;
    uint32_t subcluster = (uint32_t)(in_cluster >> map->format.subcluster_bits);
    const uint64_t *words;
    uint32_t slot;

    if (describe_missing_table(map, guest_offset, nbytes, out))
        return;
    memset(out, 0, sizeof(*out));
    nbytes = least(nbytes, covered - in_cluster);
    out->nbytes = nbytes;
    slot = l2map_find(map, cluster >> map->slice_bits);
    if (slot == NONE)
        return;
    words = slice_words(map, slot) + (index << map->format.word_bits);
    describe_entry(map, entry_of(&map->format, words, 0), cluster, subcluster, out);
    out->nbytes = least(nbytes, extend(map, words, cluster, subcluster, in_cluster + nbytes, out) - in_cluster);
    if ((out->host_offset || out->kind == L2_DATA || out->kind == L2_ZERO_ALLOCATED) && out->kind != L2_COMPRESSED && out->kind != L2_BAD)
        out->host_offset += in_cluster;
}
