#include "bench/driver.h"

#include <errno.h>
#include <linux/virtio_ring.h>
#include <stddef.h>
#include <string.h>

#include "ring/shared.h"
#include "ring/worker.h"

uint64_t driver_ring_driver_offset(uint32_t size)
{
    return 16 * (uint64_t)size;
}

uint64_t driver_ring_device_offset(uint32_t size)
{
    return (driver_ring_driver_offset(size) + 4 + 2 * (uint64_t)size + 2 + 63) & ~63ull;
}

uint64_t driver_ring_nbytes(uint32_t size)
{
    return driver_ring_device_offset(size) + 4 + 8 * (uint64_t)size + 2;
}

static uint16_t *used_event(const struct driver_ring *ring)
{
    return &ring->driver->ring[ring->size];
}

static uint16_t *avail_event(const struct driver_ring *ring)
{
    return (uint16_t *)(void *)&ring->device->ring[ring->size];
}

void driver_ring_init(struct driver_ring *ring, void *host, uint32_t size, uint32_t ring_flags, uint32_t base)
{
    uint8_t *start = host;

    if (ring_flags & RING_PACKED) {
        driver_packed_init(ring, start, size, ring_flags & RING_EVENT_IDX, base);
        return;
    }
    *ring = (struct driver_ring){
        .descriptors = (struct vring_desc *)(void *)start,
        .driver = (struct vring_avail *)(void *)(start + driver_ring_driver_offset(size)),
        .device = (struct vring_used *)(void *)(start + driver_ring_device_offset(size)),
        .size = size,
        .event_idx = ring_flags & RING_EVENT_IDX,
        .next_available = base,
        .published_available = base,
        .next_used = base,
        .free_count = size,
    };
    for (uint32_t i = 0; i < size; i++)
        ring->descriptors[i].next = i + 1;
    shared_store16(&ring->driver->idx, base);
    shared_store16(&ring->device->idx, base);
    shared_store16(used_event(ring), base);
    shared_store16(avail_event(ring), base);
}

static void fill(struct vring_desc *descriptors, const struct driver_buffer *buffers, uint32_t count, uint16_t first)
{
    uint16_t index = first;

    for (uint32_t i = 0; i < count; i++) {
        uint16_t next = descriptors[index].next;
        descriptors[index] = (struct vring_desc){
            .addr = buffers[i].guest_address,
            .len = buffers[i].nbytes,
            .flags = (buffers[i].is_writable ? VRING_DESC_F_WRITE : 0) | (i + 1 < count ? VRING_DESC_F_NEXT : 0),
            .next = next,
        };
        index = next;
    }
}

static void fill_indirect(struct vring_desc *table, const struct driver_buffer *buffers, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        table[i].next = i + 1;
    fill(table, buffers, count, 0);
}

static void post(struct driver_ring *ring, uint16_t head)
{
    shared_store16(&ring->driver->ring[ring->next_available & (ring->size - 1)], head);
    ring->next_available++;
}

int driver_ring_add(struct driver_ring *ring, const struct driver_buffer *buffers, uint32_t count,
                    void *indirect_host, uint64_t indirect_guest_address)
{
    uint32_t length = indirect_host ? 1 : count;
    uint16_t head = ring->free_head;

    if (ring->packed)
        return driver_packed_add(ring, buffers, count, indirect_host, indirect_guest_address);
    if (length > ring->free_count)
        return -ENOSPC;
    for (uint32_t i = 0; i < length; i++)
        ring->free_head = ring->descriptors[ring->free_head].next;
    ring->free_count -= length;
    ring->lengths[head] = length;
    if (indirect_host) {
        fill_indirect(indirect_host, buffers, count);
        ring->descriptors[head].addr = indirect_guest_address;
        ring->descriptors[head].len = 16 * count;
        ring->descriptors[head].flags = VRING_DESC_F_INDIRECT;
    } else {
        fill(ring->descriptors, buffers, count, head);
    }
    post(ring, head);
    return head;
}

void driver_ring_add_head(struct driver_ring *ring, uint32_t head)
{
    if (ring->packed)
        driver_packed_add_id(ring, head);
    else
        post(ring, head);
}

int driver_ring_publish(struct driver_ring *ring)
{
    uint16_t before = ring->published_available;

    if (ring->packed)
        return driver_packed_publish(ring);
    if (before == ring->next_available)
        return 0;
    shared_store_release16(&ring->driver->idx, ring->next_available);
    ring->published_available = ring->next_available;
    shared_fence();
    if (ring->event_idx)
        return vring_need_event(shared_load16(avail_event(ring)), ring->next_available, before);
    return !(shared_load16(&ring->device->flags) & VRING_USED_F_NO_NOTIFY);
}

static void give_back(struct driver_ring *ring, uint16_t head)
{
    uint16_t last = head;

    if (ring->lengths[head] == 0)
        return; /* posted by driver_ring_add_head */
    for (uint32_t i = 1; i < ring->lengths[head]; i++)
        last = ring->descriptors[last].next;
    ring->descriptors[last].next = ring->free_head;
    ring->free_head = head;
    ring->free_count += ring->lengths[head];
    ring->lengths[head] = 0;
}

int driver_ring_poll(struct driver_ring *ring, uint32_t *nbytes)
{
    struct vring_used_elem element;

    if (ring->packed)
        return driver_packed_poll(ring, nbytes);
    if (shared_load_acquire16(&ring->device->idx) == ring->next_used)
        return -EAGAIN;
    shared_copy(&element, &ring->device->ring[ring->next_used & (ring->size - 1)], sizeof(element));
    ring->next_used++;
    if (element.id >= ring->size)
        return -EPROTO;
    give_back(ring, element.id);
    *nbytes = element.len;
    return element.id;
}

int driver_ring_arm(struct driver_ring *ring)
{
    if (ring->packed)
        return driver_packed_arm(ring);
    if (ring->event_idx)
        shared_store16(used_event(ring), ring->next_used);
    else
        shared_store16(&ring->driver->flags, 0);
    shared_fence();
    return shared_load_acquire16(&ring->device->idx) != ring->next_used;
}
