/* A split virtqueue, seen from the driver: for tests, examples and load.
 *
 * The memory is the caller's, zeroed; one thread drives a ring.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "ring/virtqueue.h"

struct driver_buffer {
    uint64_t guest_address;
    uint32_t nbytes;
    uint32_t is_writable; /* by the device */
};

struct driver_ring {
    struct vring_desc *descriptors;
    struct vring_avail *driver;
    struct vring_used *device;
    uint32_t size;
    bool event_idx;
    uint16_t next_available; /* filled so far */
    uint16_t published_available;
    uint16_t next_used; /* taken so far */
    uint16_t free_head; /* list through descriptors[].next */
    uint32_t free_count;
    uint16_t lengths[VIRTQUEUE_SIZE_MAX]; /* descriptors of the chain at each head */
};

/* Bytes of ring memory for `size` entries, and where its parts are in it; alignment 16. */
uint64_t driver_ring_nbytes(uint32_t size);
uint64_t driver_ring_driver_offset(uint32_t size);
uint64_t driver_ring_device_offset(uint32_t size);

void driver_ring_init(struct driver_ring *ring, void *host, uint32_t size, int event_idx, uint32_t base);

/* Post a chain; the device sees it at the next publication. Given an indirect
 * table (16 * count bytes at both addresses), one descriptor is used.
 * -> its head; -ENOSPC: too few descriptors are free. */
int driver_ring_add(struct driver_ring *ring, const struct driver_buffer *buffers, uint32_t count,
                    void *indirect_host, uint64_t indirect_guest_address);

/* Post the same head once more, as a driver must not. */
void driver_ring_add_head(struct driver_ring *ring, uint32_t head);

/* Show the device what was posted. -> 1 if it wants a kick. */
int driver_ring_publish(struct driver_ring *ring);

/* -> the head of a chain that came back, *nbytes were written to it; -EAGAIN: none. */
int driver_ring_poll(struct driver_ring *ring, uint32_t *nbytes);

/* Ask for a call. -> 1 if a chain came back meanwhile: poll before sleeping. */
int driver_ring_arm(struct driver_ring *ring);
