/* Packed virtqueues. Spec: virtio 1.2, 2.8. */
#include <stddef.h>
#include <string.h>

#include "ring/chain.h"
#include "ring/packed.h"
#include "ring/virtqueue_format.h"

_Static_assert(sizeof(struct vring_packed_desc) == 16, "2.8.13");
_Static_assert(sizeof(struct vring_packed_desc_event) == 4, "2.8.14");

int packed_relocate(struct virtqueue *queue, const struct virtqueue_layout *layout, const struct guest_memory *memory)
{
    queue->cells = guest_memory_ring(memory, layout->descriptor_address, 16 * (uint64_t)layout->size);
    queue->driver_event = guest_memory_ring(memory, layout->driver_address, 4);
    queue->device_event = guest_memory_ring(memory, layout->device_address, 4);
    if (!queue->cells || !queue->driver_event || !queue->device_event)
        return -EFAULT;
    if ((uintptr_t)queue->cells % 16 || (uintptr_t)queue->driver_event % 4 || (uintptr_t)queue->device_event % 4)
        return -EINVAL;
    return 0;
}

static int open_inflight(struct virtqueue *queue, const struct virtqueue_layout *layout)
{
    struct inflight_packed_state state = {.used = queue->used, .slots = &queue->slots};

    queue->fault = inflight_packed_open(&queue->inflight, layout->inflight, layout->inflight_entries, queue->cells,
                                        queue->size, &state);
    /* The front-end's base is what it was when the ring first started, if a
     * daemon died: the ring has no index to look it up. */
    if (queue->fault || !queue->inflight.is_continued)
        return 0;
    queue->used = state.used;
    queue->available = position_after(state.used, state.outstanding, queue->size);
    queue->outstanding = state.outstanding;
    return 0;
}

int packed_begin(struct virtqueue *queue, const struct virtqueue_layout *layout)
{
    queue->available = position_parse(layout->base);
    queue->used = position_parse(layout->base >> 16);
    if (queue->available.index >= queue->size || queue->used.index >= queue->size)
        return -EINVAL;
    queue->outstanding = position_distance(queue->used, queue->available, queue->size);
    if (queue->outstanding > queue->size)
        return -EINVAL;
    return layout->inflight ? open_inflight(queue, layout) : 0;
}

/* ---- fetching ---- */

static int walk_indirect(struct virtqueue *queue, struct guest_memory *memory,
                         const struct vring_packed_desc *descriptor, struct chain *chain)
{
    struct table table;
    int result = enter_indirect(queue, memory, descriptor->addr, descriptor->len, descriptor->flags, &table);

    if (result == 0 && table.count > CHAIN_DESCRIPTORS_MAX)
        return broken(queue, "a chain is longer than 1024 descriptors");
    for (uint32_t i = 0; result == 0 && i < table.count; i++) {
        struct vring_packed_desc each;
        if (load_descriptor(memory, &table, i, &each) < 0)
            return broken(queue, "a descriptor lies outside guest memory");
        if (each.flags & VRING_DESC_F_INDIRECT)
            return broken(queue, "an indirect table holds an indirect descriptor");
        result = append_buffer(queue, memory, each.addr, each.len, each.flags, chain);
    }
    return result;
}

/* Collect what one descriptor, a copy, stands for. */
static int append(struct virtqueue *queue, struct guest_memory *memory, const struct vring_packed_desc *descriptor,
                  bool is_first, struct chain *chain)
{
    if (!(descriptor->flags & VRING_DESC_F_INDIRECT))
        return append_buffer(queue, memory, descriptor->addr, descriptor->len, descriptor->flags, chain);
    if (!is_first)
        return broken(queue, "an indirect descriptor is part of a chain");
    return walk_indirect(queue, memory, descriptor, chain);
}

static int check_id(struct virtqueue *queue, uint16_t id)
{
    if (slots_hold(&queue->slots, id))
        return broken(queue, "a buffer id is posted again while it is in flight");
    return 0;
}

/* -> the number of descriptors of the chain at queue->available. */
static int walk_chain(struct virtqueue *queue, struct guest_memory *memory, struct chain *chain)
{
    struct ring_position at = queue->available;
    struct table table = {queue->cells, 0, queue->size};

    for (int count = 1; queue->outstanding + count <= queue->size; count++, at = position_after(at, 1, queue->size)) {
        struct vring_packed_desc descriptor;
        bool is_last;
        int result;

        load_descriptor(memory, &table, at.index, &descriptor);
        is_last = !(descriptor.flags & VRING_DESC_F_NEXT);
        result = append(queue, memory, &descriptor, count == 1, chain);
        if (result == 0 && is_last)
            result = check_id(queue, descriptor.id);
        if (result < 0)
            return result;
        if (is_last)
            chain->head = slots_take(&queue->slots, descriptor.id, count);
        inflight_packed_fetched(&queue->inflight, &descriptor, count == 1, is_last ? chain->head : -1);
        if (is_last)
            return count;
    }
    return broken(queue, "more descriptors are available than the ring has");
}

/* One that an earlier daemon had fetched: its slots in the ring may be others' by now. */
static int pop_pending(struct virtqueue *queue, struct guest_memory *memory, struct chain *chain)
{
    uint16_t slot = queue->inflight.pending[queue->inflight.pending_next], entry = UINT16_MAX;

    chain->head = slot;
    for (uint16_t i = 0; i < queue->slots.lengths[slot]; i++) {
        struct vring_packed_desc descriptor;
        inflight_packed_load(&queue->inflight, slot, &entry, &descriptor);
        if (append(queue, memory, &descriptor, i == 0, chain) < 0)
            return -EPROTO;
    }
    queue->inflight.pending_next++;
    return 1;
}

static bool has_available(const struct virtqueue *queue)
{
    return packed_is_available(shared_load_acquire16(&queue->cells[queue->available.index].flags),
                               queue->available.wrap);
}

int packed_pop(struct virtqueue *queue, struct guest_memory *memory, struct chain *chain)
{
    int count;

    chain_clear(chain);
    if (inflight_has_pending(&queue->inflight))
        return pop_pending(queue, memory, chain);
    if (!has_available(queue))
        return 0;
    count = walk_chain(queue, memory, chain);
    if (count < 0) {
        inflight_packed_drop(&queue->inflight);
        return count;
    }
    queue->outstanding += count;
    queue->available = position_after(queue->available, count, queue->size);
    return 1;
}

/* ---- giving back ---- */

void packed_push(struct virtqueue *queue, uint16_t slot, uint32_t nbytes)
{
    queue->batch_nbytes[queue->batch_count] = nbytes;
    queue->batch[queue->batch_count++] = slot;
}

/* Write one used element. Its flags are what the driver waits for. */
static void write_used(struct virtqueue *queue, struct ring_position at, uint16_t i)
{
    struct vring_packed_desc *cell = &queue->cells[at.index];
    uint16_t flags = packed_mark(at.wrap, at.wrap) | (queue->batch_nbytes[i] ? VRING_DESC_F_WRITE : 0);

    cell->id = queue->slots.ids[queue->batch[i]];
    cell->len = queue->batch_nbytes[i];
    shared_store_release16(&cell->flags, flags);
}

/* The first element's flags come last, so that the driver sees all of the batch or nothing. */
static void write_batch(struct virtqueue *queue)
{
    struct ring_position at = queue->used;

    for (uint16_t i = 0; i < queue->batch_count; i++) {
        if (i)
            write_used(queue, at, i);
        at = position_after(at, queue->slots.lengths[queue->batch[i]], queue->size);
    }
    write_used(queue, queue->used, 0);
}

static bool wants_call(const struct virtqueue *queue, struct ring_position now, uint32_t count)
{
    struct vring_packed_desc_event event;

    shared_copy(&event, queue->driver_event, sizeof(event));
    if (event.flags == VRING_PACKED_EVENT_FLAG_DESC && queue->event_idx)
        return packed_need_event(event.off_wrap, now, count, queue->size);
    return event.flags != VRING_PACKED_EVENT_FLAG_DISABLE;
}

void packed_show(struct virtqueue *queue)
{
    uint32_t count = 0;
    struct ring_position end;

    if (!queue->batch_count)
        return;
    for (uint16_t i = 0; i < queue->batch_count; i++)
        count += queue->slots.lengths[queue->batch[i]];
    end = position_after(queue->used, count, queue->size);
    inflight_packed_publishing(&queue->inflight, queue->batch, queue->batch_count, end);
    write_batch(queue);
    queue->used = end;
    inflight_packed_published(&queue->inflight, queue->batch, queue->batch_count, end);
    for (uint16_t i = 0; i < queue->batch_count; i++)
        slots_give_back(&queue->slots, queue->batch[i]);
    queue->batch_count = 0;
    queue->outstanding -= count;
    queue->unasked += count;
}

int packed_publish(struct virtqueue *queue)
{
    uint32_t count;

    packed_show(queue);
    if (!queue->unasked)
        return 0;
    count = queue->unasked < queue->size ? queue->unasked : queue->size; /* a lap asks for every place */
    queue->unasked = 0;
    shared_fence();
    return wants_call(queue, queue->used, count);
}

/* ---- notifications ---- */

int packed_arm(struct virtqueue *queue)
{
    if (queue->event_idx) {
        shared_store16(&queue->device_event->off_wrap, position_pack(queue->available));
        shared_store_release16(&queue->device_event->flags, VRING_PACKED_EVENT_FLAG_DESC);
    } else {
        shared_store16(&queue->device_event->flags, VRING_PACKED_EVENT_FLAG_ENABLE);
    }
    shared_fence();
    return has_available(queue);
}

void packed_disarm(struct virtqueue *queue)
{
    shared_store16(&queue->device_event->flags, VRING_PACKED_EVENT_FLAG_DISABLE);
}
