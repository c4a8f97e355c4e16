#include <errno.h>
#include <linux/virtio_ring.h>
#include <stddef.h>
#include <string.h>

#include "bench/driver.h"
#include "ring/packed.h"
#include "ring/shared.h"

void driver_packed_init(struct driver_ring *ring, uint8_t *host, uint32_t size, bool event_idx, uint32_t base)
{
    memset(ring, 0, sizeof(*ring));
    ring->packed = true;
    ring->event_idx = event_idx;
    ring->size = ring->free_count = size;
    ring->cells = (struct vring_packed_desc *)(void *)host;
    ring->driver_event = (struct vring_packed_desc_event *)(void *)(host + driver_ring_driver_offset(size));
    ring->device_event = (struct vring_packed_desc_event *)(void *)(host + driver_ring_device_offset(size));
    ring->available = position_parse(base);
    ring->used = position_parse(base >> 16);
    for (uint32_t i = 0; i < size; i++) {
        ring->next_id[i] = i + 1;
        /* Cells that are filled next belong to the lap before. */
        ring->cells[i].flags = packed_mark(!ring->available.wrap, !ring->available.wrap);
    }
    for (uint32_t i = 0; i < ring->available.index; i++)
        ring->cells[i].flags = packed_mark(ring->available.wrap, ring->available.wrap);
}

/* Fill the next cell. The device sees nothing of what follows a cell whose flags are held back. */
static void fill(struct driver_ring *ring, const struct driver_buffer *buffer, uint16_t id, uint16_t flags)
{
    struct vring_packed_desc *cell = &ring->cells[ring->available.index];

    flags |= packed_mark(ring->available.wrap, !ring->available.wrap);
    flags |= buffer->is_writable ? VRING_DESC_F_WRITE : 0;
    cell->addr = buffer->guest_address;
    cell->len = buffer->nbytes;
    cell->id = id;
    if (ring->unpublished++ == 0) {
        ring->held = ring->available;
        ring->held_flags = flags;
    } else {
        shared_store16(&cell->flags, flags);
    }
    ring->available = position_after(ring->available, 1, ring->size);
}

/* -> the buffer that stands for an indirect chain. */
static struct driver_buffer fill_indirect(struct vring_packed_desc *table, const struct driver_buffer *buffers,
                                          uint32_t count, uint64_t guest_address)
{
    for (uint32_t i = 0; i < count; i++)
        table[i] = (struct vring_packed_desc){
            .addr = buffers[i].guest_address,
            .len = buffers[i].nbytes,
            .flags = buffers[i].is_writable ? VRING_DESC_F_WRITE : 0,
        };
    return (struct driver_buffer){guest_address, 16 * count, false};
}

int driver_packed_add(struct driver_ring *ring, const struct driver_buffer *buffers, uint32_t count,
                      void *indirect_host, uint64_t indirect_guest_address)
{
    uint32_t length = indirect_host ? 1 : count;
    uint16_t id = ring->free_id;

    if (length > ring->free_count)
        return -ENOSPC;
    ring->free_id = ring->next_id[id];
    ring->free_count -= length;
    ring->lengths[id] = length;
    ring->posted_indirect[id] = indirect_host != NULL;
    if (indirect_host) {
        ring->posted[id] = fill_indirect(indirect_host, buffers, count, indirect_guest_address);
        fill(ring, &ring->posted[id], id, VRING_DESC_F_INDIRECT);
        return id;
    }
    ring->posted[id] = buffers[0];
    for (uint32_t i = 0; i < count; i++)
        fill(ring, &buffers[i], id, i + 1 < count ? VRING_DESC_F_NEXT : 0);
    return id;
}

void driver_packed_add_id(struct driver_ring *ring, uint16_t id)
{
    struct driver_buffer nothing = {0, 0, false};
    bool is_known = id < ring->size;

    fill(ring, is_known ? &ring->posted[id] : &nothing, id,
         is_known && ring->posted_indirect[id] ? VRING_DESC_F_INDIRECT : 0);
}

int driver_packed_publish(struct driver_ring *ring)
{
    uint32_t count = ring->unpublished;
    struct vring_packed_desc_event event;

    if (count == 0)
        return 0;
    shared_store_release16(&ring->cells[ring->held.index].flags, ring->held_flags);
    ring->unpublished = 0;
    shared_fence();
    shared_copy(&event, ring->device_event, sizeof(event));
    if (event.flags == VRING_PACKED_EVENT_FLAG_DESC && ring->event_idx)
        return packed_need_event(event.off_wrap, ring->available, count, ring->size);
    return event.flags != VRING_PACKED_EVENT_FLAG_DISABLE;
}

static void give_back(struct driver_ring *ring, uint16_t id)
{
    ring->free_count += ring->lengths[id];
    ring->lengths[id] = 0;
    ring->next_id[id] = ring->free_id;
    ring->free_id = id;
}

int driver_packed_poll(struct driver_ring *ring, uint32_t *nbytes)
{
    const struct vring_packed_desc *cell = &ring->cells[ring->used.index];
    struct vring_packed_desc element;

    if (!packed_is_used(shared_load_acquire16(&cell->flags), ring->used.wrap))
        return -EAGAIN;
    shared_copy(&element, cell, sizeof(element));
    if (element.id >= ring->size)
        return -EPROTO;
    ring->used = position_after(ring->used, ring->lengths[element.id] ? ring->lengths[element.id] : 1, ring->size);
    if (ring->lengths[element.id])
        give_back(ring, element.id); /* else it was posted by driver_packed_add_id */
    *nbytes = element.len;
    return element.id;
}

int driver_packed_arm(struct driver_ring *ring)
{
    if (ring->event_idx) {
        shared_store16(&ring->driver_event->off_wrap, position_pack(ring->used));
        shared_store_release16(&ring->driver_event->flags, VRING_PACKED_EVENT_FLAG_DESC);
    } else {
        shared_store16(&ring->driver_event->flags, VRING_PACKED_EVENT_FLAG_ENABLE);
    }
    shared_fence();
    return packed_is_used(shared_load_acquire16(&ring->cells[ring->used.index].flags), ring->used.wrap);
}
