/* A virtqueue, split or packed, seen from the driver: for tests, examples and load.
 *
 * The memory is the caller's, zeroed; one thread drives a ring.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "ring/virtqueue.h"

#define DRIVER_SIZE_MAX 1024

struct driver_buffer {
    uint64_t guest_address;
    uint32_t nbytes;
    uint32_t is_writable; /* by the device */
};

struct driver_ring {
    bool packed;
    /* split */
    struct vring_desc *descriptors;
    struct vring_avail *driver;
    struct vring_used *device;
    uint32_t size;
    bool event_idx;
    uint16_t next_available; /* filled so far */
    uint16_t published_available;
    uint16_t next_used; /* taken so far */
    uint16_t free_head; /* list through descriptors[].next */
    /* packed */
    struct vring_packed_desc *cells;
    struct vring_packed_desc_event *driver_event;
    struct vring_packed_desc_event *device_event;
    struct ring_position available; /* filled so far */
    struct ring_position used;      /* taken so far */
    struct ring_position held;      /* the first cell that is filled and not published, and its flags */
    uint16_t held_flags;
    uint32_t unpublished; /* descriptors */
    uint16_t free_id;     /* list through next_id */
    uint16_t next_id[DRIVER_SIZE_MAX];
    struct driver_buffer posted[DRIVER_SIZE_MAX]; /* the first buffer, or the indirect table, of each id */
    bool posted_indirect[DRIVER_SIZE_MAX];
    /* both */
    uint32_t free_count;
    uint16_t lengths[DRIVER_SIZE_MAX]; /* descriptors of the chain with each head or id */
};

/* Bytes of ring memory for `size` entries, and where its parts are in it; alignment
 * 16. A packed ring has its parts in the same places, and needs less. */
uint64_t driver_ring_nbytes(uint32_t size);
uint64_t driver_ring_driver_offset(uint32_t size);
uint64_t driver_ring_device_offset(uint32_t size);

/* ring_flags: of worker.h. base: what the device is told, see virtqueue_layout. */
void driver_ring_init(struct driver_ring *ring, void *host, uint32_t size, uint32_t ring_flags, uint32_t base);

/* Post a chain; the device sees it at the next publication. Given an indirect
 * table (16 * count bytes at both addresses), one descriptor is used.
 * -> its head or buffer id; -ENOSPC: too few descriptors are free. */
int driver_ring_add(struct driver_ring *ring, const struct driver_buffer *buffers, uint32_t count,
                    void *indirect_host, uint64_t indirect_guest_address);

/* Post the same head once more, as a driver must not; of a packed ring, a chain of one descriptor. */
void driver_ring_add_head(struct driver_ring *ring, uint32_t head);

/* Show the device what was posted. -> 1 if it wants a kick. */
int driver_ring_publish(struct driver_ring *ring);

/* -> the head or buffer id of a chain that came back, *nbytes were written to it; -EAGAIN: none. */
int driver_ring_poll(struct driver_ring *ring, uint32_t *nbytes);

/* Ask for a call. -> 1 if a chain came back meanwhile: poll before sleeping. */
int driver_ring_arm(struct driver_ring *ring);

/* ---- the same for a packed ring, between driver.c and driver_packed.c ---- */

void driver_packed_init(struct driver_ring *ring, uint8_t *host, uint32_t size, bool event_idx, uint32_t base);
int driver_packed_add(struct driver_ring *ring, const struct driver_buffer *buffers, uint32_t count,
                      void *indirect_host, uint64_t indirect_guest_address);
void driver_packed_add_id(struct driver_ring *ring, uint16_t id);
int driver_packed_publish(struct driver_ring *ring);
int driver_packed_poll(struct driver_ring *ring, uint32_t *nbytes);
int driver_packed_arm(struct driver_ring *ring);
