/* Requests in flight, noted in memory that outlives us: the next daemon finds there what this one had begun.
 *
 * The region belongs to the front-end, which may write to it: recovery copies
 * and checks it once, and from then on it is only written. The order of the
 * stores is the specification's; each is a point where SIGKILL may strike.
 * Spec: vhost-user "Inflight I/O tracking".
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "ring/shared.h"

#define INFLIGHT_ENTRIES_MAX 1024 /* VIRTQUEUE_SIZE_MAX */

struct inflight_split_entry {
    uint8_t inflight;
    uint8_t padding[5];
    uint16_t next;
    uint64_t counter;
};
_Static_assert(sizeof(struct inflight_split_entry) == 16, "DescStateSplit");

struct inflight_split {
    uint64_t features;
    uint16_t version; /* 0: nobody used it yet */
    uint16_t desc_num;
    uint16_t last_batch_head;
    uint16_t used_idx;
    struct inflight_split_entry desc[];
};
_Static_assert(sizeof(struct inflight_split) == 16, "QueueRegionSplit");

/* The tracking of one queue: its part of the region, and what we never read back from it. */
struct inflight {
    struct inflight_split *split; /* NULL: not tracked */
    bool is_continued;            /* an earlier daemon used the region */
    uint64_t counter;             /* of the request fetched next */
    uint16_t pending_next;        /* of `pending`, resubmitted so far */
    uint16_t pending_count;
    uint16_t last_batch_head;
    uint16_t batch_count;
    uint16_t batch[INFLIGHT_ENTRIES_MAX];   /* pushed and not published yet */
    uint16_t pending[INFLIGHT_ENTRIES_MAX]; /* fetched by an earlier daemon, in its order */
    bool busy[INFLIGHT_ENTRIES_MAX];        /* fetched, now or by an earlier daemon, and not published */
};

/* Bytes of one queue's part. The specification gives the records, not how the
 * parts follow each other; this is libvhost-user's way, so that a region may
 * change hands between it and us. */
uint64_t inflight_nbytes(uint32_t entries);

/* Begin, or go on where the last daemon was killed: what it had fetched and not
 * completed becomes `pending`. used_index: of the used ring.
 * -> NULL, or what is wrong with the region. */
const char *inflight_split_open(struct inflight *inflight, void *region, uint32_t entries, uint16_t size,
                                uint16_t used_index);

static inline bool inflight_has_pending(const struct inflight *inflight)
{
    return inflight->pending_next != inflight->pending_count;
}

/* Whether a driver that posts this head lies: a batch holds each head once. */
static inline bool inflight_split_is_busy(const struct inflight *inflight, uint16_t head)
{
    return inflight->split && inflight->busy[head];
}

static inline void inflight_split_fetched(struct inflight *inflight, uint16_t head)
{
    if (!inflight->split)
        return;
    inflight->busy[head] = true;
    inflight->split->desc[head].counter = inflight->counter++;
    shared_store_release8(&inflight->split->desc[head].inflight, 1);
}

static inline void inflight_split_pushed(struct inflight *inflight, uint16_t head)
{
    if (!inflight->split)
        return;
    inflight->split->desc[head].next = inflight->last_batch_head;
    shared_store_release16(&inflight->split->last_batch_head, head);
    inflight->last_batch_head = head;
    inflight->batch[inflight->batch_count++] = head;
}

/* After the used index was stored: who dies before this is done has published a
 * batch that still says it is in flight, which the list of the batch tells. */
static inline void inflight_split_published(struct inflight *inflight, uint16_t used_index)
{
    if (!inflight->split)
        return;
    for (uint16_t i = 0; i < inflight->batch_count; i++) {
        shared_store_release8(&inflight->split->desc[inflight->batch[i]].inflight, 0);
        inflight->busy[inflight->batch[i]] = false;
    }
    inflight->batch_count = 0;
    shared_store_release16(&inflight->split->used_idx, used_index);
}
