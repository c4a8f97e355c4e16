/* Split virtqueues. Spec: virtio 1.2, 2.7. */
#include "ring/virtqueue.h"

#include <errno.h>
#include <linux/virtio_ring.h>
#include <stddef.h>
#include <string.h>

#include "ring/shared.h"

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

static int broken(struct virtqueue *queue, const char *fault)
{
    queue->fault = fault;
    return -EPROTO;
}

int virtqueue_relocate(struct virtqueue *queue, const struct virtqueue_layout *layout,
                       const struct guest_memory *memory)
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

int virtqueue_init(struct virtqueue *queue, const struct virtqueue_layout *layout, const struct guest_memory *memory)
{
    int result;

    memset(queue, 0, sizeof(*queue));
    if (layout->size == 0 || layout->size > VIRTQUEUE_SIZE_MAX || layout->size & (layout->size - 1))
        return -EINVAL;
    queue->size = layout->size;
    queue->event_idx = layout->event_idx;
    result = virtqueue_relocate(queue, layout, memory);
    if (result < 0)
        return result;
    queue->next_available = queue->seen_available = layout->base;
    queue->next_used = queue->published_used = shared_load16(&queue->device->idx);
    return 0;
}

/* Where the descriptors of a chain are read from: the ring's table or an indirect one. */
struct table {
    const struct vring_desc *host; /* NULL: scattered over regions, each descriptor is looked up */
    uint64_t guest_address;
    uint32_t count;
};

static int load_descriptor(struct guest_memory *memory, const struct table *table, uint32_t index,
                           struct vring_desc *descriptor)
{
    struct iovec pieces[16];
    uint8_t *to = (uint8_t *)descriptor;
    int count;

    if (table->host) {
        shared_copy(descriptor, (const uint8_t *)table->host + 16 * (size_t)index, sizeof(*descriptor));
        return 0;
    }
    count = guest_memory_translate(memory, table->guest_address + 16 * (uint64_t)index, 16, pieces, 16);
    for (int i = 0; i < count; to += pieces[i++].iov_len)
        shared_copy(to, pieces[i].iov_base, pieces[i].iov_len);
    return count < 0 ? count : 0;
}

/* Turn to the indirect table that `descriptor`, a validated copy, refers to. */
static int enter_indirect(struct virtqueue *queue, struct guest_memory *memory, const struct vring_desc *descriptor,
                          struct table *table)
{
    struct iovec piece;
    int count;

    if (descriptor->flags & VRING_DESC_F_NEXT)
        return broken(queue, "an indirect descriptor has a next one");
    if (descriptor->len == 0 || descriptor->len % 16)
        return broken(queue, "the length of an indirect table is not a multiple of 16");
    count = guest_memory_translate(memory, descriptor->addr, descriptor->len, &piece, 1);
    if (count == -EFAULT)
        return broken(queue, "an indirect table lies outside guest memory");
    *table = (struct table){count == 1 ? piece.iov_base : NULL, descriptor->addr, descriptor->len / 16};
    return 0;
}

static int append_buffer(struct virtqueue *queue, struct guest_memory *memory, const struct vring_desc *descriptor,
                         struct chain *chain)
{
    uint32_t used = chain->readable_count + chain->writable_count;
    int count = guest_memory_translate(memory, descriptor->addr, descriptor->len, chain->pieces + used,
                                       CHAIN_PIECES_MAX - (int)used);

    if (count == -EFAULT)
        return broken(queue, "a buffer lies outside guest memory");
    if (count < 0)
        return broken(queue, "a chain has too many pieces");
    if (descriptor->flags & VRING_DESC_F_WRITE) {
        chain->writable_count += count;
        chain->writable_nbytes += descriptor->len;
        return 0;
    }
    if (chain->writable_nbytes)
        return broken(queue, "a readable buffer follows a writable one");
    chain->readable_count += count;
    chain->readable_nbytes += descriptor->len;
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
            result = enter_indirect(queue, memory, &descriptor, &table);
            if (result < 0)
                return result;
            indirect = true;
            index = 0;
            continue;
        }
        result = append_buffer(queue, memory, &descriptor, chain);
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

int virtqueue_pop(struct virtqueue *queue, struct guest_memory *memory, struct chain *chain)
{
    int count;

    if (queue->fault)
        return -EPROTO;
    count = count_available(queue);
    if (count <= 0)
        return count;
    chain->head = shared_load16(&queue->driver->ring[queue->next_available & (queue->size - 1)]);
    chain->readable_count = chain->writable_count = 0;
    chain->readable_nbytes = chain->writable_nbytes = 0;
    if (chain->head >= queue->size)
        return broken(queue, "a head is past the end of the descriptor table");
    if (walk_chain(queue, memory, chain) < 0)
        return -EPROTO;
    queue->next_available++;
    return 1;
}

void virtqueue_push(struct virtqueue *queue, uint16_t head, uint32_t nbytes)
{
    queue->device->ring[queue->next_used & (queue->size - 1)] = (struct vring_used_elem){head, nbytes};
    queue->next_used++;
}

int virtqueue_publish(struct virtqueue *queue)
{
    uint16_t before = queue->published_used;

    if (queue->next_used == before)
        return 0;
    shared_store_release16(&queue->device->idx, queue->next_used);
    queue->published_used = queue->next_used;
    shared_fence();
    if (queue->event_idx)
        return vring_need_event(shared_load16(used_event(queue)), queue->next_used, before);
    return !(shared_load16(&queue->driver->flags) & VRING_AVAIL_F_NO_INTERRUPT);
}

int virtqueue_arm(struct virtqueue *queue)
{
    if (queue->fault)
        return 0;
    if (queue->event_idx)
        shared_store16(avail_event(queue), queue->next_available);
    else
        shared_store16(&queue->device->flags, 0);
    shared_fence();
    return shared_load_acquire16(&queue->driver->idx) != queue->next_available;
}

void virtqueue_disarm(struct virtqueue *queue)
{
    /* With EVENT_IDX an avail_event left behind already asks for nothing. */
    if (!queue->fault && !queue->event_idx)
        shared_store16(&queue->device->flags, VRING_USED_F_NO_NOTIFY);
}
