/* Walking a chain, whatever the ring's format: what a copied descriptor says is checked and collected.
 *
 * Inline, because every request passes through here.
 */
#pragma once

#include <errno.h>
#include <linux/virtio_ring.h>

#include "ring/shared.h"
#include "ring/virtqueue.h"

static inline int broken(struct virtqueue *queue, const char *fault)
{
    queue->fault = fault;
    return -EPROTO;
}

static inline void chain_clear(struct chain *chain)
{
    chain->readable_count = chain->writable_count = 0;
    chain->readable_nbytes = chain->writable_nbytes = 0;
}

/* Where the descriptors of a chain are read from: the ring's table or an indirect one. */
struct table {
    const void *host; /* NULL: scattered over regions, each descriptor is looked up */
    uint64_t guest_address;
    uint32_t count;
};

/* Copy one descriptor, 16 bytes in either format. */
static inline int load_descriptor(struct guest_memory *memory, const struct table *table, uint32_t index,
                                  void *descriptor)
{
    struct iovec pieces[16];
    uint8_t *to = descriptor;
    int count;

    if (table->host) {
        shared_copy(descriptor, (const uint8_t *)table->host + 16 * (size_t)index, 16);
        return 0;
    }
    count = guest_memory_translate(memory, table->guest_address + 16 * (uint64_t)index, 16, pieces, 16);
    for (int i = 0; i < count; to += pieces[i++].iov_len)
        shared_copy(to, pieces[i].iov_base, pieces[i].iov_len);
    return count < 0 ? count : 0;
}

/* Turn to the indirect table that a descriptor refers to. */
static inline int enter_indirect(struct virtqueue *queue, struct guest_memory *memory, uint64_t guest_address,
                                 uint32_t nbytes, uint16_t flags, struct table *table)
{
    struct iovec piece;
    int count;

    if (flags & VRING_DESC_F_NEXT)
        return broken(queue, "an indirect descriptor has a next one");
    if (nbytes == 0 || nbytes % 16)
        return broken(queue, "the length of an indirect table is not a multiple of 16");
    count = guest_memory_translate(memory, guest_address, nbytes, &piece, 1);
    if (count == -EFAULT)
        return broken(queue, "an indirect table lies outside guest memory");
    *table = (struct table){count == 1 ? piece.iov_base : NULL, guest_address, nbytes / 16};
    return 0;
}

static inline int append_buffer(struct virtqueue *queue, struct guest_memory *memory, uint64_t guest_address,
                                uint32_t nbytes, uint16_t flags, struct chain *chain)
{
    uint32_t used = chain->readable_count + chain->writable_count;
    int count = guest_memory_translate(memory, guest_address, nbytes, chain->pieces + used,
                                       CHAIN_PIECES_MAX - (int)used);

    if (count == -EFAULT)
        return broken(queue, "a buffer lies outside guest memory");
    if (count < 0)
        return broken(queue, "a chain has too many pieces");
    if (flags & VRING_DESC_F_WRITE) {
        chain->writable_count += count;
        chain->writable_nbytes += nbytes;
        return 0;
    }
    if (chain->writable_nbytes)
        return broken(queue, "a readable buffer follows a writable one");
    chain->readable_count += count;
    chain->readable_nbytes += nbytes;
    return 0;
}
