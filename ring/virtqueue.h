/* A virtqueue, seen from the device: chains are popped, used elements pushed.
 *
 * Callers know nothing of the ring's format. Nothing the driver wrote is
 * trusted: a ring that contradicts itself is broken (`fault` says how) and is
 * not read any more.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "ring/inflight.h"
#include "ring/memory.h"

#define VIRTQUEUE_SIZE_MAX 32768 /* of the specification */
#define CHAIN_DESCRIPTORS_MAX 1024 /* Linux posts indirect chains longer than the ring: no tighter bound holds */
#define CHAIN_PIECES_MAX 2048      /* a descriptor may straddle regions */

struct vring_desc;
struct vring_avail;
struct vring_used;
struct vring_packed_desc;
struct vring_packed_desc_event;

struct virtqueue {
    uint16_t size;
    bool packed;
    bool event_idx;
    const char *fault; /* NULL while the ring makes sense */

    /* split */
    const struct vring_desc *descriptors;
    struct vring_avail *driver;
    struct vring_used *device;
    uint16_t next_available; /* fetched so far, free-running */
    uint16_t seen_available; /* the driver's index when last looked at */
    uint16_t next_used;      /* filled so far, free-running */
    uint16_t shown_used;     /* the driver sees so many, */
    uint16_t asked_used;     /* and of so many it was asked whether it wants a call */

    /* packed */
    struct vring_packed_desc *cells;
    const struct vring_packed_desc_event *driver_event;
    struct vring_packed_desc_event *device_event;
    struct ring_position available; /* of what is fetched next */
    struct ring_position used;      /* of what is shown next */
    uint16_t outstanding;           /* descriptors fetched and not shown */
    uint32_t unasked;               /* descriptors shown since the driver was asked whether it wants a call */
    uint16_t batch_count;
    uint16_t *batch;       /* slots pushed and not shown */
    uint32_t *batch_nbytes;
    struct slots slots;

    struct inflight inflight;
};

/* One chain, as host pieces: readable ones first. */
struct chain {
    uint16_t head; /* of a packed ring: its slot */
    uint32_t readable_count;
    uint32_t writable_count;
    uint64_t readable_nbytes;
    uint64_t writable_nbytes;
    struct iovec pieces[CHAIN_PIECES_MAX];
};

struct virtqueue_layout {
    uint32_t size;
    uint64_t descriptor_address; /* user addresses */
    uint64_t driver_address;
    uint64_t device_address;
    uint32_t base; /* what SET_VRING_BASE says: an index, or two positions of a packed ring */
    bool event_idx;
    bool packed;
    void *inflight; /* this queue's part of the in-flight region, with so many entries; NULL: not tracked */
    uint32_t inflight_entries;
};

/* -EINVAL: a size over the limit or, of a split ring, no power of two, a misaligned address,
 * an in-flight region that is too small. -EFAULT: an address outside guest memory. -ENOMEM.
 * A region that contradicts itself or the ring leaves a queue that is broken. After an error there is nothing to
 * deinit. */
int virtqueue_init(struct virtqueue *queue, const struct virtqueue_layout *layout, const struct guest_memory *memory);

/* Give its memory back; nothing is to be popped or pushed any more. */
void virtqueue_deinit(struct virtqueue *queue);

/* Find the ring again after the memory table changed; everything pushed is
 * published. -EFAULT, -EINVAL: it is gone, and may only be relocated again. */
int virtqueue_relocate(struct virtqueue *queue, const struct virtqueue_layout *layout,
                       const struct guest_memory *memory);

/* -> 1 and a chain, 0 if the driver posted nothing more, -EPROTO if the ring is broken.
 * What an earlier daemon left in flight comes first, in the order it was fetched. */
int virtqueue_pop(struct virtqueue *queue, struct guest_memory *memory, struct chain *chain);

/* Fill a used element, which the driver does not see yet. At most one per popped chain, so the ring cannot overflow. */
void virtqueue_push(struct virtqueue *queue, uint16_t head, uint32_t nbytes);

/* Show the driver what was pushed, if it happens to look: one that sleeps is called after the next publication. */
void virtqueue_show(struct virtqueue *queue);

/* Show the driver what was pushed. -> 1 if it wants to be called for that, or for what was shown since the last one. */
int virtqueue_publish(struct virtqueue *queue);

/* Ask to be kicked. -> 1 if something was posted meanwhile: look before sleeping. */
int virtqueue_arm(struct virtqueue *queue);

/* Ask not to be kicked. */
void virtqueue_disarm(struct virtqueue *queue);

/* How many bytes the device area has, all that we write of a ring. */
static inline uint64_t virtqueue_device_nbytes(const struct virtqueue *queue)
{
    return queue->packed ? 4 : 4 + 8 * (uint64_t)queue->size + 2;
}

/* What an earlier daemon left in flight is not all fetched yet. */
static inline bool virtqueue_has_pending(const struct virtqueue *queue)
{
    return !queue->fault && inflight_has_pending(&queue->inflight);
}

/* What GET_VRING_BASE says after the queue is drained. */
uint32_t virtqueue_base(const struct virtqueue *queue);
