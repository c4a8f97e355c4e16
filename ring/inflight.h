/* Requests in flight, noted in memory that outlives us: the next daemon finds there what this one had begun.
 *
 * The region belongs to the front-end, which may write to it: recovery copies
 * and checks it once, and from then on it is only written. The order of the
 * stores is the specification's; each is a point where SIGKILL may strike.
 * Spec: vhost-user "Inflight I/O tracking".
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "ring/assertion.h"
#include "ring/shared.h"
#include "ring/slots.h"

#define INFLIGHT_ENTRIES_MAX 32768 /* VIRTQUEUE_SIZE_MAX */

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

struct inflight_packed_entry {
    uint8_t inflight;
    uint8_t padding;
    uint16_t next;
    uint16_t last;
    uint16_t num;
    uint64_t counter;
    uint16_t id;
    uint16_t flags;
    uint32_t len;
    uint64_t addr;
};
_Static_assert(sizeof(struct inflight_packed_entry) == 32, "DescStatePacked");

/* used_idx to old_used_wrap_counter: one word, so that they change together. The
 * specification stores them one by one, and a death between two of those stores
 * would leave a position with the wrap counter of another lap. */
union inflight_packed_used {
    struct {
        uint16_t used_idx;
        uint16_t old_used_idx;
        uint8_t used_wrap_counter;
        uint8_t old_used_wrap_counter;
    };
    uint64_t word;
};
_Static_assert(sizeof(union inflight_packed_used) == 8, "QueueRegionPacked");
_Static_assert(offsetof(union inflight_packed_used, old_used_idx) == 2, "QueueRegionPacked");
_Static_assert(offsetof(union inflight_packed_used, used_wrap_counter) == 4, "QueueRegionPacked");
_Static_assert(offsetof(union inflight_packed_used, old_used_wrap_counter) == 5, "QueueRegionPacked");

struct inflight_packed {
    uint64_t features;
    uint16_t version;
    uint16_t desc_num;
    uint16_t free_head;
    uint16_t old_free_head;
    union inflight_packed_used used;
    uint8_t padding[5];
    struct inflight_packed_entry desc[] __attribute__((aligned(8)));
};
_Static_assert(sizeof(struct inflight_packed) == 32, "QueueRegionPacked");

/* A place in a packed ring, and the lap it belongs to. */
struct ring_position {
    uint16_t index;
    bool wrap;
};

/* The tracking of one queue: its part of the region, and what we never read back from it. */
struct inflight {
    struct inflight_split *split; /* both NULL: not tracked */
    struct inflight_packed *packed;
    bool is_continued;            /* an earlier daemon used the region */
    uint64_t counter;             /* of the request fetched next */
    uint16_t pending_next;        /* of `pending`, resubmitted so far */
    uint16_t pending_count;
    uint16_t *pending;            /* heads or slots of what an earlier daemon had fetched, in its order */
    /* split */
    uint16_t last_batch_head;
    uint16_t batch_count;
    uint16_t *batch; /* pushed and not published yet */
    bool *busy;      /* fetched, now or by an earlier daemon, and not published */
    /* packed */
    struct ring_position used; /* published so far */
    uint16_t free_head;
    uint16_t old_free_head;
    uint16_t *next;  /* of each entry */
    uint16_t *last;  /* entry of a chain, by its first one */
    uint16_t *first; /* entry of a chain, by its slot */
};

/* Bytes of one queue's part. The specification gives the records, not how the
 * parts follow each other; libvhost-user and DPDK align them like this. */
uint64_t inflight_nbytes(uint32_t entries, int packed);

/* Bytes of each part of a region: all of it, shared evenly. */
uint64_t inflight_part(uint64_t nbytes, uint32_t num_queues);

/* How many entries a part has room for, at most INFLIGHT_ENTRIES_MAX. A front-end says how many it wants before it
 * knows its rings: QEMU 10.0 asks for 128 and has rings of up to 1024. So the size of the region counts. */
uint32_t inflight_entries(uint64_t part, int packed);

/* Memory to track a ring of `size` in a part of `entries`. -> false: there is none. */
bool inflight_init(struct inflight *inflight, uint32_t size, uint32_t entries, bool packed);
void inflight_deinit(struct inflight *inflight);

/* Begin, or go on where the last daemon was killed: what it had fetched and not
 * completed becomes `pending`. used_index: of the used ring.
 * -> NULL, or what is wrong with the region. */
const char *inflight_split_open(struct inflight *inflight, void *region, uint16_t size, uint16_t used_index);

struct vring_packed_desc;

/* What a packed ring continues with. */
struct inflight_packed_state {
    struct ring_position used;
    struct slots *slots;  /* chains in flight are put there */
    uint16_t outstanding; /* descriptors of all of them */
};

/* The same for a packed ring, whose descriptors tell whether the last batch was
 * published. state->used is the front-end's word for a region that nobody used yet. */
const char *inflight_packed_open(struct inflight *inflight, void *region, uint32_t entries,
                                 struct vring_packed_desc *cells, uint16_t size, struct inflight_packed_state *state);

/* Note one descriptor of the chain that is being fetched; the last one, which has a slot, makes the chain count. */
void inflight_packed_fetched(struct inflight *inflight, const struct vring_packed_desc *descriptor, bool is_first,
                             int slot);

/* The chain that is being fetched is nonsense: forget what was noted of it. */
void inflight_packed_drop(struct inflight *inflight);

/* Copy a descriptor of a pending chain: its first one if *entry is UINT16_MAX, then the next. */
void inflight_packed_load(const struct inflight *inflight, uint16_t slot, uint16_t *entry,
                          struct vring_packed_desc *descriptor);

/* Around the publication of a batch that ends before `used`. */
void inflight_packed_publishing(struct inflight *inflight, const uint16_t *slots, uint16_t count,
                                struct ring_position used);
void inflight_packed_published(struct inflight *inflight, const uint16_t *slots, uint16_t count,
                               struct ring_position used);

/* Put the survivors of an earlier daemon in order; later requests count on from there. */
struct survivor {
    uint64_t counter;
    uint16_t head;
};
void inflight_resubmit(struct inflight *inflight, struct survivor *survivors, uint16_t count);

#define INFLIGHT_VERSION 1

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
    ASSERT(inflight->busy[head]);
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
