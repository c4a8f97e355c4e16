#include "ring/inflight.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#define ALIGNMENT 64u

uint64_t inflight_nbytes(uint32_t entries, int packed)
{
    uint64_t nbytes = packed ? sizeof(struct inflight_packed) + sizeof(struct inflight_packed_entry) * (uint64_t)entries
                             : sizeof(struct inflight_split) + sizeof(struct inflight_split_entry) * (uint64_t)entries;

    return (nbytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

uint64_t inflight_part(uint64_t nbytes, uint32_t num_queues)
{
    return nbytes / num_queues / ALIGNMENT * ALIGNMENT;
}

uint32_t inflight_entries(uint64_t part, int packed)
{
    uint64_t head = packed ? sizeof(struct inflight_packed) : sizeof(struct inflight_split);
    uint64_t each = packed ? sizeof(struct inflight_packed_entry) : sizeof(struct inflight_split_entry);
    uint64_t entries = part < head ? 0 : (part - head) / each;

    return entries < INFLIGHT_ENTRIES_MAX ? entries : INFLIGHT_ENTRIES_MAX;
}

bool inflight_init(struct inflight *inflight, uint32_t size, uint32_t entries, bool packed)
{
    inflight->pending = calloc(size, sizeof(*inflight->pending));
    if (packed) {
        inflight->next = calloc(entries, sizeof(*inflight->next));
        inflight->last = calloc(entries, sizeof(*inflight->last));
        inflight->first = calloc(size, sizeof(*inflight->first));
        return inflight->pending && inflight->next && inflight->last && inflight->first;
    }
    inflight->batch = calloc(size, sizeof(*inflight->batch));
    inflight->busy = calloc(size, sizeof(*inflight->busy));
    return inflight->pending && inflight->batch && inflight->busy;
}

void inflight_deinit(struct inflight *inflight)
{
    free(inflight->pending);
    free(inflight->batch);
    free(inflight->busy);
    free(inflight->next);
    free(inflight->last);
    free(inflight->first);
    memset(inflight, 0, sizeof(*inflight));
}

static int compare(const void *a, const void *b)
{
    const struct survivor *left = a, *right = b;

    return (left->counter > right->counter) - (left->counter < right->counter);
}

void inflight_resubmit(struct inflight *inflight, struct survivor *survivors, uint16_t count)
{
    qsort(survivors, count, sizeof(*survivors), compare);
    for (uint16_t i = 0; i < count; i++)
        inflight->pending[i] = survivors[i].head;
    inflight->pending_count = count;
    inflight->counter = count ? survivors[count - 1].counter + 1 : 0;
}

/* ---- split ---- */

/* Only what a ring of this size uses: the rest of a large region stays untouched, and takes no memory. */
static void split_begin(struct inflight_split *region, uint16_t size, uint16_t used_index)
{
    memset(region, 0, sizeof(*region) + size * sizeof(*region->desc));
    region->desc_num = size;
    region->used_idx = used_index; /* the ring may come from another life: a migration, a pause */
    shared_store_release16(&region->version, INFLIGHT_VERSION);
}

/* The last batch was published and perhaps not cleared: clear it now. */
static const char *split_finish_batch(struct inflight_split *region, const struct inflight_split *seen, uint16_t size,
                                      uint16_t used_index)
{
    uint16_t count = used_index - seen->used_idx;
    uint16_t head = seen->last_batch_head;

    if (count > size)
        return "the in-flight region is of another ring: the used indices are too far apart";
    for (; count; count--) {
        if (head >= size)
            return "a batch in the in-flight region leads past the end of the ring";
        shared_store_release8(&region->desc[head].inflight, 0);
        head = shared_load16(&region->desc[head].next);
    }
    shared_store_release16(&region->used_idx, used_index);
    return NULL;
}

static const char *split_collect(struct inflight *inflight, uint16_t size)
{
    struct survivor *survivors = calloc(size, sizeof(*survivors));
    uint16_t count = 0;

    if (!survivors)
        return "no memory to read the in-flight region";

    for (uint16_t head = 0; head < size; head++) {
        struct inflight_split_entry entry;
        shared_copy(&entry, &inflight->split->desc[head], sizeof(entry));
        inflight->busy[head] = entry.inflight;
        if (entry.inflight)
            survivors[count++] = (struct survivor){entry.counter, head};
    }
    inflight_resubmit(inflight, survivors, count);
    free(survivors);
    return NULL;
}

const char *inflight_split_open(struct inflight *inflight, void *region, uint16_t size, uint16_t used_index)
{
    struct inflight_split seen;
    const char *fault;

    inflight->split = region;
    shared_copy(&seen, region, sizeof(seen));
    if (seen.version == 0) {
        split_begin(region, size, used_index);
        return NULL;
    }
    if (seen.version != INFLIGHT_VERSION || seen.features)
        return "the in-flight region has a version or features that are unknown";
    inflight->is_continued = true;
    inflight->last_batch_head = seen.last_batch_head;
    fault = split_finish_batch(region, &seen, size, used_index);
    return fault ? fault : split_collect(inflight, size);
}
