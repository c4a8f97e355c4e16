#include "ring/virtqueue.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "ring/packed.h"
#include "ring/virtqueue_format.h"

int virtqueue_relocate(struct virtqueue *queue, const struct virtqueue_layout *layout,
                       const struct guest_memory *memory)
{
    return layout->packed ? packed_relocate(queue, layout, memory) : split_relocate(queue, layout, memory);
}

static bool allocate(struct virtqueue *queue, const struct virtqueue_layout *layout)
{
    if (layout->inflight && !inflight_init(&queue->inflight, queue->size, layout->inflight_entries, queue->packed))
        return false;
    if (!queue->packed)
        return true;
    queue->batch = calloc(queue->size, sizeof(*queue->batch));
    queue->batch_nbytes = calloc(queue->size, sizeof(*queue->batch_nbytes));
    return slots_init(&queue->slots, queue->size) && queue->batch && queue->batch_nbytes;
}

void virtqueue_deinit(struct virtqueue *queue)
{
    free(queue->batch);
    free(queue->batch_nbytes);
    queue->batch = NULL;
    queue->batch_nbytes = NULL;
    slots_deinit(&queue->slots);
    inflight_deinit(&queue->inflight);
}

static int begin(struct virtqueue *queue, const struct virtqueue_layout *layout, const struct guest_memory *memory)
{
    int result = virtqueue_relocate(queue, layout, memory);

    if (result < 0)
        return result;
    if (!allocate(queue, layout))
        return -ENOMEM;
    return queue->packed ? packed_begin(queue, layout) : split_begin(queue, layout);
}

int virtqueue_init(struct virtqueue *queue, const struct virtqueue_layout *layout, const struct guest_memory *memory)
{
    int result;

    memset(queue, 0, sizeof(*queue));
    if (layout->size == 0 || layout->size > VIRTQUEUE_SIZE_MAX)
        return -EINVAL;
    if (!layout->packed && layout->size & (layout->size - 1))
        return -EINVAL;
    if (layout->inflight && layout->inflight_entries < layout->size)
        return -EINVAL;
    queue->size = layout->size;
    queue->packed = layout->packed;
    queue->event_idx = layout->event_idx;
    result = begin(queue, layout, memory);
    if (result < 0)
        virtqueue_deinit(queue);
    return result;
}

int virtqueue_pop(struct virtqueue *queue, struct guest_memory *memory, struct chain *chain)
{
    if (queue->fault)
        return -EPROTO;
    return queue->packed ? packed_pop(queue, memory, chain) : split_pop(queue, memory, chain);
}

void virtqueue_push(struct virtqueue *queue, uint16_t head, uint32_t nbytes)
{
    if (queue->packed)
        packed_push(queue, head, nbytes);
    else
        split_push(queue, head, nbytes);
}

void virtqueue_show(struct virtqueue *queue)
{
    if (queue->packed)
        packed_show(queue);
    else
        split_show(queue);
}

int virtqueue_publish(struct virtqueue *queue)
{
    return queue->packed ? packed_publish(queue) : split_publish(queue);
}

int virtqueue_arm(struct virtqueue *queue)
{
    if (queue->fault)
        return 0;
    return (queue->packed ? packed_arm(queue) : split_arm(queue)) || virtqueue_has_pending(queue);
}

void virtqueue_disarm(struct virtqueue *queue)
{
    if (queue->fault)
        return;
    if (queue->packed)
        packed_disarm(queue);
    else
        split_disarm(queue);
}

uint32_t virtqueue_base(const struct virtqueue *queue)
{
    if (!queue->packed)
        return queue->next_available;
    return (uint32_t)position_pack(queue->used) << 16 | position_pack(queue->available);
}
