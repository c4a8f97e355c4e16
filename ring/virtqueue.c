#include "ring/virtqueue.h"

#include <errno.h>
#include <string.h>

#include "ring/virtqueue_format.h"

int virtqueue_relocate(struct virtqueue *queue, const struct virtqueue_layout *layout,
                       const struct guest_memory *memory)
{
    return split_relocate(queue, layout, memory);
}

int virtqueue_init(struct virtqueue *queue, const struct virtqueue_layout *layout, const struct guest_memory *memory)
{
    int result;

    memset(queue, 0, sizeof(*queue));
    if (layout->size == 0 || layout->size > VIRTQUEUE_SIZE_MAX || layout->size & (layout->size - 1))
        return -EINVAL;
    if (layout->inflight && layout->inflight_entries < layout->size)
        return -EINVAL;
    queue->size = layout->size;
    queue->event_idx = layout->event_idx;
    result = virtqueue_relocate(queue, layout, memory);
    return result < 0 ? result : split_begin(queue, layout);
}

int virtqueue_pop(struct virtqueue *queue, struct guest_memory *memory, struct chain *chain)
{
    if (queue->fault)
        return -EPROTO;
    return split_pop(queue, memory, chain);
}

void virtqueue_push(struct virtqueue *queue, uint16_t head, uint32_t nbytes)
{
    split_push(queue, head, nbytes);
}

int virtqueue_publish(struct virtqueue *queue)
{
    return split_publish(queue);
}

int virtqueue_arm(struct virtqueue *queue)
{
    if (queue->fault)
        return 0;
    return split_arm(queue) || virtqueue_has_pending(queue);
}

void virtqueue_disarm(struct virtqueue *queue)
{
    if (!queue->fault)
        split_disarm(queue);
}
