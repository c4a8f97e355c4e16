/* In-flight tracking of packed rings: each descriptor is copied into the region, because the driver may reuse its slot. */
#include <linux/virtio_ring.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "ring/inflight.h"
#include "ring/packed.h"

static void store_used(struct inflight_packed *region, struct ring_position used, struct ring_position old)
{
    union inflight_packed_used both = {.word = 0};

    both.used_idx = used.index;
    both.used_wrap_counter = used.wrap;
    both.old_used_idx = old.index;
    both.old_used_wrap_counter = old.wrap;
    shared_store_release64(&region->used.word, both.word);
}

/* ---- while serving ---- */

void inflight_packed_fetched(struct inflight *inflight, const struct vring_packed_desc *descriptor, bool is_first,
                             int slot)
{
    struct inflight_packed *region = inflight->packed;
    uint16_t head = inflight->old_free_head, entry = inflight->free_head;
    struct inflight_packed_entry *first, *next;

    if (!region)
        return;
    first = &region->desc[head];
    next = &region->desc[entry];
    if (is_first) {
        first->num = 0;
        first->counter = inflight->counter++;
        shared_store_release8(&first->inflight, 1);
    }
    if (slot >= 0) {
        first->last = inflight->last[head] = entry;
        inflight->first[slot] = head;
    }
    first->num++;
    next->addr = descriptor->addr;
    next->len = descriptor->len;
    next->flags = descriptor->flags;
    next->id = descriptor->id;
    inflight->free_head = inflight->next[entry];
    shared_store_release16(&region->free_head, inflight->free_head);
    if (slot >= 0) {
        inflight->old_free_head = inflight->free_head;
        shared_store_release16(&region->old_free_head, inflight->old_free_head);
    }
}

void inflight_packed_drop(struct inflight *inflight)
{
    struct inflight_packed *region = inflight->packed;

    if (!region || inflight->free_head == inflight->old_free_head)
        return;
    inflight->free_head = inflight->old_free_head;
    shared_store_release16(&region->free_head, inflight->free_head);
    shared_store_release8(&region->desc[inflight->free_head].inflight, 0);
}

void inflight_packed_publishing(struct inflight *inflight, const uint16_t *slots, uint16_t count,
                                struct ring_position used)
{
    struct inflight_packed *region = inflight->packed;

    if (!region)
        return;
    for (uint16_t i = 0; i < count; i++) {
        uint16_t head = inflight->first[slots[i]], last = inflight->last[head];
        inflight->next[last] = inflight->free_head;
        region->desc[last].next = inflight->free_head;
        inflight->free_head = head;
        shared_store_release16(&region->free_head, head);
    }
    store_used(region, used, inflight->used);
}

void inflight_packed_published(struct inflight *inflight, const uint16_t *slots, uint16_t count,
                               struct ring_position used)
{
    struct inflight_packed *region = inflight->packed;

    if (!region)
        return;
    for (uint16_t i = 0; i < count; i++)
        shared_store_release8(&region->desc[inflight->first[slots[i]]].inflight, 0);
    inflight->old_free_head = inflight->free_head;
    shared_store_release16(&region->old_free_head, inflight->old_free_head);
    store_used(region, used, used);
    inflight->used = used;
}

void inflight_packed_load(const struct inflight *inflight, uint16_t slot, uint16_t *entry,
                          struct vring_packed_desc *descriptor)
{
    struct inflight_packed_entry copy;

    *entry = *entry == UINT16_MAX ? inflight->first[slot] : inflight->next[*entry];
    shared_copy(&copy, &inflight->packed->desc[*entry], sizeof(copy));
    *descriptor = (struct vring_packed_desc){copy.addr, copy.len, copy.id, copy.flags};
}

/* ---- recovery ---- */

static void begin(struct inflight *inflight, struct inflight_packed *region, uint32_t entries,
                  struct ring_position used)
{
    memset(region, 0, sizeof(*region) + entries * sizeof(*region->desc));
    for (uint32_t i = 0; i < entries; i++)
        region->desc[i].next = inflight->next[i] = i + 1;
    region->desc_num = entries;
    store_used(region, used, used);
    shared_store_release16(&region->version, INFLIGHT_VERSION);
}

static bool is_position(uint16_t index, uint8_t wrap, uint16_t size)
{
    return index < size && wrap <= 1;
}

/* Take back what an unpublished batch wrote behind its first element: the driver
 * does not look there before that one is used, but it will when another is. */
static void take_back(struct vring_packed_desc *cells, uint16_t size, struct ring_position from, uint16_t count)
{
    for (uint16_t i = 0; i < count; i++, from = position_after(from, 1, size)) {
        uint16_t flags = shared_load16(&cells[from.index].flags);
        if (packed_is_used(flags, from.wrap))
            shared_store16(&cells[from.index].flags, packed_mark(from.wrap, !from.wrap));
    }
}

/* Finish the batch under way if its first element was published, undo it if not. -> where the used ring ends */
static const char *settle_batch(struct inflight *inflight, const struct inflight_packed *seen,
                                struct vring_packed_desc *cells, uint16_t size)
{
    struct ring_position used = {seen->used.used_idx, seen->used.used_wrap_counter};
    struct ring_position old = {seen->used.old_used_idx, seen->used.old_used_wrap_counter};
    uint16_t count = position_distance(old, used, size);

    if (!is_position(used.index, seen->used.used_wrap_counter, size) ||
        !is_position(old.index, seen->used.old_used_wrap_counter, size) || count > size)
        return "the in-flight region is of another ring: its positions are not of this one";
    inflight->free_head = seen->old_free_head;
    inflight->used = old;
    if (count && !packed_is_available(shared_load16(&cells[old.index].flags), old.wrap)) {
        inflight->free_head = seen->free_head;
        inflight->used = used;
    } else if (count) {
        take_back(cells, size, old, count);
    }
    inflight->old_free_head = inflight->free_head;
    shared_store_release16(&inflight->packed->free_head, inflight->free_head);
    shared_store_release16(&inflight->packed->old_free_head, inflight->free_head);
    store_used(inflight->packed, inflight->used, inflight->used);
    return NULL;
}

/* Every entry is free or part of one chain: who claims one that is taken, lies. */
static bool claim(bool *taken, uint32_t entries, uint16_t entry)
{
    if (entry >= entries || taken[entry])
        return false;
    taken[entry] = true;
    return true;
}

/* -> how many entries are free; -1: their list goes in circles. */
static int walk_free(struct inflight *inflight, uint32_t entries, bool *taken)
{
    uint16_t entry = inflight->free_head;
    int count = 0;

    for (; entry < entries; entry = inflight->next[entry], count++) {
        if (!claim(taken, entries, entry))
            return -1;
        inflight->next[entry] = shared_load16(&inflight->packed->desc[entry].next);
        shared_store_release8(&inflight->packed->desc[entry].inflight, 0);
    }
    return count;
}

/* -> whether the chain that begins at `first` is one. */
static bool walk_chain(struct inflight *inflight, uint32_t entries, uint16_t size, bool *taken, uint16_t first,
                       struct inflight_packed_state *state, struct survivor *survivor)
{
    struct inflight_packed_entry head, copy;
    uint16_t entry = first, slot;

    shared_copy(&head, &inflight->packed->desc[first], sizeof(head));
    copy = head;
    if (head.num == 0 || head.num > size - state->outstanding)
        return false;
    for (uint16_t i = 0; i < head.num; i++) {
        if (i)
            entry = copy.next;
        if (!claim(taken, entries, entry))
            return false;
        shared_copy(&copy, &inflight->packed->desc[entry], sizeof(copy));
        inflight->next[entry] = copy.next;
    }
    if (entry != head.last || slots_hold(state->slots, copy.id))
        return false;
    slot = slots_take(state->slots, copy.id, head.num);
    state->outstanding += head.num;
    inflight->first[slot] = first;
    inflight->last[first] = entry;
    *survivor = (struct survivor){head.counter, slot};
    return true;
}

static const char *collect_into(struct inflight *inflight, uint32_t entries, uint16_t size,
                                struct inflight_packed_state *state, bool *taken, struct survivor *survivors)
{
    int free_count = walk_free(inflight, entries, taken);
    uint16_t count = 0;

    if (free_count < 0)
        return "the free entries of the in-flight region go in circles";
    for (uint32_t entry = 0; entry < entries; entry++) {
        if (taken[entry] || !shared_load8(&inflight->packed->desc[entry].inflight))
            continue;
        if (!walk_chain(inflight, entries, size, taken, entry, state, &survivors[count]))
            return "a chain of the in-flight region contradicts itself";
        count++;
    }
    if ((uint32_t)free_count + state->outstanding != entries)
        return "the in-flight region has lost entries";
    inflight_resubmit(inflight, survivors, count);
    return NULL;
}

static const char *collect(struct inflight *inflight, uint32_t entries, uint16_t size,
                           struct inflight_packed_state *state)
{
    struct survivor *survivors = calloc(size, sizeof(*survivors));
    bool *taken = calloc(entries, sizeof(*taken));
    const char *fault = "no memory to read the in-flight region";

    if (survivors && taken)
        fault = collect_into(inflight, entries, size, state, taken, survivors);
    free(survivors);
    free(taken);
    return fault;
}

const char *inflight_packed_open(struct inflight *inflight, void *region, uint32_t entries,
                                 struct vring_packed_desc *cells, uint16_t size, struct inflight_packed_state *state)
{
    struct inflight_packed seen;
    const char *fault;

    inflight->packed = region;
    inflight->used = state->used;
    shared_copy(&seen, region, sizeof(seen));
    if (seen.version == 0) {
        begin(inflight, region, entries, state->used);
        return NULL;
    }
    if (seen.version != INFLIGHT_VERSION || seen.features)
        return "the in-flight region has a version or features that are unknown";
    inflight->is_continued = true;
    /* Who made the region laid its list over so many: another part of the room was never written. */
    if (seen.desc_num < size || seen.desc_num > entries)
        return "the in-flight region is of another ring: it has another number of entries";
    fault = settle_batch(inflight, &seen, cells, size);
    if (!fault)
        fault = collect(inflight, seen.desc_num, size, state);
    state->used = inflight->used;
    return fault;
}
