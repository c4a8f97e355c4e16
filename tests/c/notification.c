/* Who is told what, and when, without a race to win: each step of the protocol by itself. */
#include <linux/virtio_blk.h>

#include "tests/c/fixture.h"

static struct guest_memory memory;
static struct chain chain;
static struct guest_region region;

static struct virtqueue start(struct driver_ring *ring, bool event_idx, uint16_t base)
{
    struct virtqueue_layout layout = {
        .size = 8,
        .driver_address = driver_ring_driver_offset(8),
        .device_address = driver_ring_device_offset(8),
        .base = base,
        .event_idx = event_idx,
    };
    struct virtqueue queue;

    memset(region.host, 0, driver_ring_nbytes(8));
    driver_ring_init(ring, region.host, 8, event_idx, base);
    CHECK(virtqueue_init(&queue, &layout, &memory) == 0);
    return queue;
}

static int post(struct driver_ring *ring)
{
    struct driver_buffer buffer = {4096, 16, false};

    CHECK(driver_ring_add(ring, &buffer, 1, NULL, 0) >= 0);
    return driver_ring_publish(ring);
}

/* The device looks, finds nothing, and asks to be kicked; what was posted between must not be slept on. */
static void check_arm(bool event_idx, uint16_t base)
{
    struct driver_ring ring;
    struct virtqueue queue = start(&ring, event_idx, base);

    CHECK(virtqueue_arm(&queue) == 0);
    CHECK(post(&ring) == 1);
    CHECK(virtqueue_pop(&queue, &memory, &chain) == 1);
    virtqueue_disarm(&queue);
    CHECK(virtqueue_pop(&queue, &memory, &chain) == 0);
    CHECK(post(&ring) == 0);
    CHECK(virtqueue_arm(&queue) == 1);
    CHECK(virtqueue_pop(&queue, &memory, &chain) == 1);
    CHECK(virtqueue_arm(&queue) == 0);
    CHECK(post(&ring) == 1);
}

/* A call is due when the used index passes what the driver asked for, however many elements do it. */
static void check_publish(bool event_idx, uint16_t base)
{
    struct driver_ring ring;
    struct virtqueue queue = start(&ring, event_idx, base);
    uint32_t nbytes;

    for (int i = 0; i < 4; i++)
        post(&ring);
    for (int i = 0; i < 4; i++)
        CHECK(virtqueue_pop(&queue, &memory, &chain) == 1);
    CHECK(virtqueue_publish(&queue) == 0);
    virtqueue_push(&queue, 0, 0);
    virtqueue_push(&queue, 1, 0);
    CHECK(virtqueue_publish(&queue) == 1);
    virtqueue_push(&queue, 2, 0);
    CHECK(virtqueue_publish(&queue) == !event_idx); /* it did not ask again */
    for (int i = 0; i < 3; i++)
        CHECK(driver_ring_poll(&ring, &nbytes) == i);
    CHECK(driver_ring_arm(&ring) == 0);
    virtqueue_push(&queue, 3, 7);
    CHECK(driver_ring_poll(&ring, &nbytes) < 0); /* not published */
    CHECK(virtqueue_publish(&queue) == 1);
    CHECK(driver_ring_arm(&ring) == 1);
    CHECK(driver_ring_poll(&ring, &nbytes) == 3 && nbytes == 7);
}

/* What is shown is seen at once, and called for later: once, however often it was shown. */
static void check_show(bool event_idx, uint16_t base)
{
    struct driver_ring ring;
    struct virtqueue queue = start(&ring, event_idx, base);
    uint32_t nbytes;

    for (int i = 0; i < 3; i++) {
        post(&ring);
        CHECK(virtqueue_pop(&queue, &memory, &chain) == 1);
    }
    for (int i = 0; i < 3; i++) {
        virtqueue_push(&queue, i, 0);
        CHECK(driver_ring_poll(&ring, &nbytes) < 0);
        virtqueue_show(&queue);
        virtqueue_show(&queue);
        CHECK(driver_ring_poll(&ring, &nbytes) == i);
    }
    CHECK(virtqueue_publish(&queue) == 1);
    CHECK(virtqueue_publish(&queue) == 0);
    CHECK(driver_ring_arm(&ring) == 0);
    CHECK(virtqueue_publish(&queue) == 0);
}

int main(void)
{
    static const uint16_t bases[] = {0, 1, 32766, 32767, 65530, 65533, 65534, 65535};
    int fd = new_memfd("guest", MEMORY_NBYTES);

    CHECK(guest_region_map(&region, fd, 0, 0, MEMORY_NBYTES, 0) == 0);
    CHECK(guest_memory_add(&memory, &region) == 0);
    for (size_t i = 0; i < sizeof(bases) / sizeof(*bases); i++)
        for (int event_idx = 0; event_idx < 2; event_idx++) {
            check_arm(event_idx, bases[i]);
            check_publish(event_idx, bases[i]);
            check_show(event_idx, bases[i]);
        }
    guest_region_unmap(&region);
    close(fd);
    return 0;
}
