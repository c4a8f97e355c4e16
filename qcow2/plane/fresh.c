/* Places for writes that find nothing in the image: a cluster, and what will name it.
 *
 * This decides nothing. Python filled the stock with clusters that plain data may
 * be written to and linked without any barrier, for writes whose cluster shows
 * zeros: their L2 entry is their name. Where the backing file shows through, the
 * entry must not be in the file before the data is stable: a record in the link
 * log is the name, and the cluster need not be stable either. Without a log, or
 * where the guest waits for the disk anyway, the entry is the name there, too, once
 * a SYNC has made the data stable, and the cluster with it. So it is in a file for
 * data alone, where each cluster has its place, unless that is an untouched hole.
 * Only that is served, in a table that is the image's alone, where nobody holds the
 * cluster. Everything else is Python's.
 */
#include <endian.h>
#include <errno.h>
#include <stdbool.h>
#include <string.h>

#include "qcow2/plane/l2map.h"
#include "qcow2/plane/space.h"
#include "ring/assertion.h"

void l2map_set_stock(struct l2map *map, struct stock *stock, struct stock *unsynced)
{
    map->stock = stock;
    map->unsynced = unsynced;
}

void l2map_set_untouched(struct l2map *map, struct untouched *untouched)
{
    map->untouched = untouched;
}

void l2map_set_log(struct l2map *map, struct link_log *log)
{
    map->log = log;
}

void l2map_set_logless(struct l2map *map, int is_logless)
{
    map->is_logless = is_logless;
}

int l2map_holds(const struct l2map *map, uint64_t first, uint64_t last)
{
    for (uint32_t i = 0; i < map->nheld; i++)
        if (first <= map->held[i] && map->held[i] <= last)
            return 1;
    return 0;
}

/* What the guest sees of nbytes at `start`, all nothing or all zeros in this image: one run of zeros, one of data, or else
 * punt. */
static struct extent describe_old(struct l2map *map, uint64_t start, uint64_t nbytes)
{
    struct extent first, under;
    struct l2_run run;

    if (nbytes > map->size - start)
        nbytes = map->size - start;
    l2map_describe(map, start, nbytes, &run);
    if (run.nbytes == nbytes && (run.kind == L2_ZERO_PLAIN || (run.kind == L2_ZERO_ALLOCATED && run.copied)))
        return (struct extent){.kind = EXTENT_ZERO, .nbytes = nbytes};
    if (run.kind != L2_UNALLOCATED || run.nbytes < nbytes || (run.host_offset && !run.copied))
        return (struct extent){.kind = EXTENT_PUNT};
    l2map_translate_backing(map, start, nbytes, NULL, &first);
    if (first.kind == EXTENT_DATA && first.nbytes == nbytes)
        return first;
    under = first;
    for (uint64_t done = 0; under.kind == EXTENT_ZERO && under.nbytes;) {
        done += under.nbytes;
        if (done == nbytes)
            return (struct extent){.kind = EXTENT_ZERO, .nbytes = nbytes};
        l2map_translate_backing(map, start + done, nbytes - done, NULL, &under);
    }
    return (struct extent){.kind = EXTENT_PUNT};
}

/* Once when the stock runs low one write is Python's, so that it comes by and sees to more. */
static int is_wanted_by_python(struct stock *stock)
{
    if (stock->left > stock->low)
        return 0;
    stock->low = 0;
    return stock->left != 0;
}

/* Whether the map may look for a place for these bytes at all. */
static int is_simple(struct l2map *map, uint64_t cluster, uint64_t in_cluster, uint64_t nbytes)
{
    return map->stock && map->stock->is_open && map->writable && map->slot != SLOT_UNKNOWN &&
           (!map->format.is_identity || map->untouched) && in_cluster + nbytes <= UINT64_C(1) << map->cluster_bits &&
           !l2map_is_locked(map, cluster, cluster) && l2map_find(map, cluster >> map->slice_bits) != NONE;
}

/* What is held may come to be spoiled, too. */
static int take_cluster(const struct l2map *map, struct stock *stock, uint64_t *host_cluster)
{
    return stock->nspoiled + map->nheld < STOCK_SPOILED && !is_wanted_by_python(stock) &&
           stock_take(stock, 1, host_cluster);
}

/* A write, all in one cluster, and the subclusters that it touches. */
struct touched {
    uint64_t cluster, start; /* guest offset of the first subcluster */
    uint64_t nbytes;         /* of them */
    uint32_t first, last;
    struct entry entry; /* as it is */
};

static struct entry entry_of_place(const struct extent_place *place)
{
    return (struct entry){place->entry[0], place->entry[1]};
}

/* The L2 entry itself, in the file. */
static void name_in_table(const struct l2map *map, struct extent_place *place, uint64_t entry_offset)
{
    uint64_t words[2] = {htobe64(place->entry[0]), htobe64(place->entry[1])};

    place->name_offset = entry_offset;
    place->name_nbytes = UINT32_C(1) << entry_format_bits(&map->format);
    memcpy(place->name, words, place->name_nbytes);
}

/* What is written around the nbytes: all that the entry will name, unless that is zeros already. The old content need
 * not be read if all of it is written over. */
static void fill_around(const struct l2map *map, struct extent_place *place, const struct extent *old,
                        const struct touched *touched, uint64_t nbytes)
{
    if (nbytes == touched->nbytes && !map->cipher)
        return;
    place->old_nbytes = touched->nbytes;
    place->ahead = place->guest_offset - touched->start;
    if (old->kind == EXTENT_DATA && nbytes < old->nbytes) {
        place->old_slot = old->slot;
        place->old_offset = old->host_offset;
        place->old_cipher = old->cipher;
    }
}

/* A record of it, in the link log. */
static void name_in_log(struct l2map *map, struct extent_place *place, uint64_t cluster)
{
    struct entry old_entry = {place->old_entry[0], place->old_entry[1]};

    place->memory = map->log->memory;
    place->name_offset = link_log_record(map->log, cluster, old_entry, entry_of_place(place), place->name);
    place->name_nbytes = LINK_RECORD_NBYTES;
    place->mark_offset = LINK_MARK_OFFSET;
    link_log_mark(map->log, map->log->next, place->mark);
}

static struct touched touch(struct l2map *map, uint64_t guest_offset, uint64_t nbytes)
{
    uint32_t unit_bits = map->format.subcluster_bits;
    struct touched touched = {.cluster = guest_offset >> map->cluster_bits};
    uint64_t cluster_start = touched.cluster << map->cluster_bits;

    touched.first = (uint32_t)((guest_offset - cluster_start) >> unit_bits);
    touched.last = (uint32_t)((guest_offset - cluster_start + nbytes - 1) >> unit_bits);
    touched.start = cluster_start + ((uint64_t)touched.first << unit_bits);
    touched.nbytes = least((uint64_t)(touched.last + 1 - touched.first) << unit_bits, map->size - touched.start);
    touched.entry = l2map_entry(map, touched.cluster);
    return touched;
}

/* The entry that makes the touched subclusters of the host cluster at host_offset the guest's. One that is zeros, where
 * zeros showed, is its as a whole. */
static struct entry entry_after(struct l2map *map, const struct touched *touched, uint64_t host_offset, int is_zeros)
{
    if (is_zeros && map->format.word_bits &&
        describe_old(map, touched->cluster << map->cluster_bits, UINT64_C(1) << map->cluster_bits).kind ==
                        EXTENT_ZERO)
        return entry_data(&map->format, host_offset);
    return entry_written(&map->format, touched->entry, host_offset, touched->first, touched->last);
}

/* Whether the disk does not end in the last subcluster. */
static int is_whole(const struct l2map *map, const struct touched *touched)
{
    return touched->nbytes == (uint64_t)(touched->last + 1 - touched->first) << map->format.subcluster_bits;
}

/* The disk ends inside a subcluster, of which nothing is encrypted, or whose cluster may hold anything behind that. */
static int is_end_pythons(const struct l2map *map, const struct touched *touched)
{
    return (map->cipher || (entry_has_cluster(&map->format, touched->entry) && !map->format.is_identity)) &&
           !is_whole(map, touched);
}

/* Whether the name waits for the data: something shows that must not be lost, or in the place may be anything. */
static int must_wait(const struct l2map *map, const struct touched *touched, const struct extent *old)
{
    return old->kind == EXTENT_DATA || entry_has_cluster(&map->format, touched->entry) ||
           (map->format.is_identity && !untouched_has(map->untouched, touched->cluster, touched->cluster));
}

/* The place: in a file of its own data has one, of its own; it stays in the cluster that the entry has, or gets one. */
static int find_cluster(const struct l2map *map, const struct touched *touched, int waits, uint64_t *host_cluster)
{
    *host_cluster = map->format.is_identity ? touched->cluster : entry_host_offset(touched->entry) >> map->cluster_bits;
    return map->format.is_identity || entry_has_cluster(&map->format, touched->entry) ||
           take_cluster(map, waits ? map->unsynced : map->stock, host_cluster);
}

/* Whether the entry itself may be the name, after a SYNC: no link of its slice waits, which would come to be older. */
static int may_name_after_sync(const struct l2map *map, uint64_t cluster, int syncs)
{
    return (syncs || map->is_logless) && !l2map_is_claimed(map, cluster >> map->slice_bits);
}

static int may_name_in_log(const struct l2map *map)
{
    return map->log && link_log_has_room(map->log) && !link_log_calls_python(map->log);
}

static int take(void *context, uint64_t guest_offset, uint64_t nbytes, int syncs, struct extent_place *out)
{
    struct l2map *map = context;
    uint64_t cluster = guest_offset >> map->cluster_bits, in_cluster = guest_offset - (cluster << map->cluster_bits);
    uint64_t table = l2map_private_table(map, cluster), host_cluster;
    struct touched touched;
    struct entry entry;
    struct extent old;
    int is_kept, waits;

    if (!table || !is_simple(map, cluster, in_cluster, nbytes))
        return -EAGAIN;
    if (l2map_holds(map, cluster, cluster))
        return -EBUSY;
    touched = touch(map, guest_offset, nbytes);
    old = describe_old(map, touched.start, touched.nbytes);
    *out = (struct extent_place){
        .slot = map->data_slot,
        .name_slot = map->slot,
        .host_offset = guest_offset,
        .guest_offset = guest_offset,
        .old_entry = {touched.entry.word, touched.entry.bitmap},
    };
    is_kept = entry_has_cluster(&map->format, touched.entry);
    waits = must_wait(map, &touched, &old);
    out->after_sync = waits && may_name_after_sync(map, cluster, syncs);
    if (old.kind == EXTENT_PUNT || (waits && !out->after_sync && !may_name_in_log(map)) ||
        (waits && is_end_pythons(map, &touched)) || (is_kept && !map->format.word_bits) ||
        !find_cluster(map, &touched, waits, &host_cluster))
        return -EAGAIN;
    entry = entry_after(map, &touched, host_cluster << map->cluster_bits, !waits);
    out->host_offset = (host_cluster << map->cluster_bits) + in_cluster;
    out->entry[0] = entry.word;
    out->entry[1] = entry.bitmap;
    out->is_kept = is_kept;
    out->cipher = map->cipher;
    out->old_slot = EXTENT_NO_SLOT;
    out->old_nbytes = map->cipher ? nbytes : 0; /* they are written through a buffer */
    if (waits)
        fill_around(map, out, &old, &touched, nbytes);
    if (waits && !out->after_sync)
        name_in_log(map, out, cluster);
    else
        name_in_table(map, out, table + l2map_in_table(map, cluster));
    return 0;
}

static void link_waits(struct l2map *map, const struct extent_place *place)
{
    struct link_log *log = map->log;

    ASSERT(log->nlinks < WAITING_LINKS && log->next - log->first < log->capacity);
    log->links[log->nlinks++] = (struct waiting_link){
        place->guest_offset >> map->cluster_bits,
        {place->entry[0], place->entry[1]},
    };
    log->has_called = 0;
    log->next++;
}

static void hold(void *context, const struct extent_place *place)
{
    struct l2map *map = context;

    ASSERT(map->nheld < EXTENT_HELD);
    map->held[map->nheld++] = place->guest_offset >> map->cluster_bits;
}

/* Whoever changes the entry waits for us, and its slice stays, so it is as it was; but others may have logged. */
static int find(void *context, struct extent_place *place)
{
    struct l2map *map = context;
    uint64_t cluster = place->guest_offset >> map->cluster_bits, table = l2map_private_table(map, cluster);
    struct entry old_entry = {place->old_entry[0], place->old_entry[1]};

    if (!map->writable || !table || l2map_find(map, cluster >> map->slice_bits) == NONE ||
        !entry_is_same(l2map_entry(map, cluster), old_entry))
        return -EAGAIN;
    if (!place->memory)
        return table + l2map_in_table(map, cluster) == place->name_offset ? 0 : -EAGAIN;
    if (!map->log || place->memory != map->log->memory || !link_log_has_room(map->log))
        return -EAGAIN;
    name_in_log(map, place, cluster);
    return 0;
}

/* -> whether it was held. */
static int let_go(struct l2map *map, uint64_t cluster)
{
    for (uint32_t i = 0; i < map->nheld; i++) {
        if (map->held[i] != cluster)
            continue;
        map->held[i] = map->held[--map->nheld];
        return 1;
    }
    return 0;
}

static int conclude(void *context, const struct extent_place *place, enum extent_outcome outcome, int error)
{
    struct l2map *map = context;
    uint64_t cluster = place->guest_offset >> map->cluster_bits;
    int was_held = let_go(map, cluster);
    struct stock *stock = place->memory || place->after_sync ? map->unsynced : map->stock;
    uint64_t host_cluster = place->host_offset >> map->cluster_bits;
    int is_new = !place->is_kept && !map->format.is_identity;

    if (outcome == EXTENT_NAMED) {
        ASSERT(was_held || !l2map_is_locked(map, cluster, cluster));
        stock->linked += !place->is_kept;
        if (place->memory)
            link_waits(map, place);
        l2map_update(map, place->guest_offset, place->entry, 1);
        return 0;
    }
    if (outcome == EXTENT_UNTOUCHED) {
        ASSERT(!was_held);
        if (is_new)
            stock_put_back(stock, host_cluster);
        return 0;
    }
    if (map->untouched)
        untouched_forget(map->untouched, host_cluster, host_cluster);
    if (is_new) {
        ASSERT(stock->nspoiled < STOCK_SPOILED);
        stock->spoiled[stock->nspoiled++] = host_cluster;
    }
    /* Without space an entry is as it was; after anything else nobody knows. */
    if (!error || lacks_space(error))
        return 0;
    return l2map_fail(map, error);
}

static const struct extent_places places = {take, hold, find, conclude, l2map_clear};

uintptr_t l2map_places_address(void)
{
    return (uintptr_t)&places;
}
