/* Split virtqueues. Spec: virtio 1.2, 2.7. */
#include "ring/virtqueue_format.h"

#include <stddef.h>

#include "ring/chain.h"

_Static_assert(sizeof(struct vring_desc) == 16, "2.7.5");
_Static_assert(sizeof(struct vring_used_elem) == 8, "2.7.8");
_Static_assert(offsetof(struct vring_avail, ring) == 4 && offsetof(struct vring_used, ring) == 4, "2.7.6, 2.7.8");

static uint16_t *used_event(const struct virtqueue *queue)
{
    return &queue->driver->ring[queue->size];
}

static uint16_t *avail_event(const struct virtqueue *queue)
{
    return (uint16_t *)(void *)&queue->device->ring[queue->size];
}

int split_relocate(struct virtqueue *queue, const struct virtqueue_layout *layout, const struct guest_memory *memory)
{
    uint64_t size = layout->size;

    queue->descriptors = guest_memory_ring(memory, layout->descriptor_address, 16 * size);
    queue->driver = guest_memory_ring(memory, layout->driver_address, 4 + 2 * size + 2);
    queue->device = guest_memory_ring(memory, layout->device_address, 4 + 8 * size + 2);
    if (!queue->descriptors || !queue->driver || !queue->device)
        return -EFAULT;
    /* A file offset may be odd, so aligned user addresses are not enough. */
    if ((uintptr_t)queue->descriptors % 16 || (uintptr_t)queue->driver % 2 || (uintptr_t)queue->device % 4)
        return -EINVAL;
    return 0;
}

int split_begin(struct virtqueue *queue, const struct virtqueue_layout *layout)
{
    struct inflight *inflight = &queue->inflight;

    if (layout->base > UINT16_MAX)
        return -EINVAL;
    queue->next_available = queue->seen_available = layout->base;
    queue->next_used = queue->shown_used = queue->asked_used = shared_load16(&queue->device->idx);
    if (!layout->inflight)
        return 0;
    queue->fault = inflight_split_open(inflight, layout->inflight, queue->size, queue->next_used);
    /* The front-end's base is no more than a used index if a daemon died; what
     * was fetched is what was completed and what is in flight. */
    if (!queue->fault && inflight->is_continued)
        queue->next_available = queue->seen_available = queue->next_used + inflight->pending_count;
    return 0;
}

static int walk_chain(struct virtqueue *queue, struct guest_memory *memory, struct chain *chain)
{
    struct table table = {queue->descriptors, 0, queue->size};
    uint32_t index = chain->head;
    bool indirect = false;

    for (uint32_t walked = 0; walked < CHAIN_DESCRIPTORS_MAX;) {
        struct vring_desc descriptor;
        int result;

        if (index >= table.count)
            return broken(queue, "a descriptor index is past the end of its table");
        if (load_descriptor(memory, &table, index, &descriptor) < 0)
            return broken(queue, "a descriptor lies outside guest memory");
        if (descriptor.flags & VRING_DESC_F_INDIRECT) {
            if (indirect)
                return broken(queue, "an indirect table holds an indirect descriptor");
            result = enter_indirect(queue, memory, descriptor.addr, descriptor.len, descriptor.flags, &table);
            if (result < 0)
                return result;
            indirect = true;
            index = 0;
            continue;
        }
        result = append_buffer(queue, memory, descriptor.addr, descriptor.len, descriptor.flags, chain);
        if (result < 0)
            return result;
        if (!(descriptor.flags & VRING_DESC_F_NEXT))
            return 1;
        index = descriptor.next;
        walked++;
        if (!indirect && walked >= queue->size)
            return broken(queue, "a chain loops");
    }
    return broken(queue, "a chain is longer than 1024 descriptors");
}

/* -> how many chains the driver has posted that were not fetched. */
static int count_available(struct virtqueue *queue)
{
    uint16_t count;

    if (queue->seen_available == queue->next_available)
        queue->seen_available = shared_load_acquire16(&queue->driver->idx);
    count = queue->seen_available - queue->next_available;
    if (count > queue->size)
        return broken(queue, "the available index is more than the queue size ahead");
    return count;
}

/* One that an earlier daemon had fetched: it is not in the available ring any more. */
static int pop_pending(struct virtqueue *queue, struct guest_memory *memory, struct chain *chain)
{
    chain_clear(chain);
    chain->head = queue->inflight.pending[queue->inflight.pending_next];
    if (walk_chain(queue, memory, chain) < 0)
        return -EPROTO;
    queue->inflight.pending_next++;
    return 1;
}

int split_pop(struct virtqueue *queue, struct guest_memory *memory, struct chain *chain)
{
    int count;

    if (inflight_has_pending(&queue->inflight))
        return pop_pending(queue, memory, chain);
    count = count_available(queue);
    if (count <= 0)
        return count;
    chain_clear(chain);
    chain->head = shared_load16(&queue->driver->ring[queue->next_available & (queue->size - 1)]);
    if (chain->head >= queue->size)
        return broken(queue, "a head is past the end of the descriptor table");
    if (inflight_split_is_busy(&queue->inflight, chain->head))
        return broken(queue, "a head is posted again while it is in flight");
    if (walk_chain(queue, memory, chain) < 0)
        return -EPROTO;
    inflight_split_fetched(&queue->inflight, chain->head);
    queue->next_available++;
    return 1;
}

void split_push(struct virtqueue *queue, uint16_t head, uint32_t nbytes)
{
    queue->device->ring[queue->next_used & (queue->size - 1)] = (struct vring_used_elem){head, nbytes};
    queue->next_used++;
    inflight_split_pushed(&queue->inflight, head);
}

void split_show(struct virtqueue *queue)
{
    if (queue->next_used == queue->shown_used)
        return;
    shared_store_release16(&queue->device->idx, queue->next_used);
    queue->shown_used = queue->next_used;
    inflight_split_published(&queue->inflight, queue->next_used);
}

int split_publish(struct virtqueue *queue)
{
    uint16_t before = queue->asked_used;

    split_show(queue);
    if (queue->shown_used == before)
        return 0;
    queue->asked_used = queue->shown_used;
    shared_fence();
    if (queue->event_idx)
        return vring_need_event(shared_load16(used_event(queue)), queue->shown_used, before);
    return !(shared_load16(&queue->driver->flags) & VRING_AVAIL_F_NO_INTERRUPT);
}

int split_arm(struct virtqueue *queue)
{
    if (queue->event_idx)
        shared_store16(avail_event(queue), queue->next_available);
    else
        shared_store16(&queue->device->flags, 0);
    shared_fence();
    return shared_load_acquire16(&queue->driver->idx) != queue->next_available;
}

void split_disarm(struct virtqueue *queue)
{
    /* With EVENT_IDX an avail_event left behind already asks for nothing. */
    if (!queue->event_idx)
        shared_store16(&queue->device->flags, VRING_USED_F_NO_NOTIFY);
}
