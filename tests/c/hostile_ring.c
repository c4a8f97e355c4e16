/* Rings, tables and headers full of noise: no input may touch a byte outside the regions, or hang us.
 *
 * Half of each descriptor is plausible, so that chains get past the first check.
 */
#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>

#include "tests/c/fixture.h"

#define ROUNDS 20000

static uint64_t state = 0x9e3779b97f4a7c15;

static uint64_t noise(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static bool often(void)
{
    return noise() % 8;
}

static void scramble_table(struct vring_desc *table, uint32_t count)
{
    static const uint32_t lengths[] = {0, 1, 15, 16, 17, 48, 512, 513, 4096, 65536, UINT32_MAX};

    for (uint32_t i = 0; i < count; i++)
        table[i] = (struct vring_desc){
            .addr = often() ? noise() % MEMORY_NBYTES : noise(),
            .len = lengths[noise() % (sizeof(lengths) / sizeof(*lengths))],
            .flags = often() ? (noise() & 3) : noise(),
            .next = often() ? noise() % count : noise(),
        };
}

static void scramble(struct fixture *fixture)
{
    uint8_t *host = fixture->region.host;
    struct vring_avail *available = (void *)(host + driver_ring_driver_offset(QUEUE_SIZE));

    scramble_table((void *)host, QUEUE_SIZE);
    scramble_table((void *)(host + 65536), 4096 - QUEUE_SIZE);
    for (uint32_t i = 0; i < QUEUE_SIZE; i++)
        available->ring[i] = often() ? noise() % QUEUE_SIZE : noise();
    available->flags = noise();
    available->idx = often() ? noise() % (QUEUE_SIZE + 1) : noise();
    for (uint32_t at = 131072; at < MEMORY_NBYTES; at += 512) {
        struct virtio_blk_outhdr header = {noise() % 16, 0, often() ? noise() % 2048 : noise()};
        memcpy(host + at, &header, sizeof(header));
    }
}

/* A well-formed header and status around noise: most of these get to the device. */
static void frame_some(struct fixture *fixture)
{
    struct vring_desc *table = (void *)fixture->region.host;

    for (uint32_t i = 0; i + 2 < QUEUE_SIZE; i += 3) {
        if (!often())
            continue;
        table[i] = (struct vring_desc){131072 + 512 * (noise() % 1024), 16, VRING_DESC_F_NEXT, i + 1};
        table[i + 1].flags = VRING_DESC_F_NEXT | (noise() & VRING_DESC_F_WRITE);
        table[i + 1].next = i + 2;
        table[i + 2] = (struct vring_desc){noise() % MEMORY_NBYTES, 1 + noise() % 2, VRING_DESC_F_WRITE, 0};
    }
}

static void endure(bool use_threads)
{
    struct fixture fixture;

    fixture_init(&fixture, use_threads);
    for (int i = 0; i < ROUNDS; i++) {
        memset(fixture.region.host, 0, driver_ring_nbytes(QUEUE_SIZE));
        fixture_start(&fixture, i & 1);
        scramble(&fixture);
        if (i & 2)
            frame_some(&fixture);
        fixture.block.writethrough = i & 4;
        eventfd_write(fixture.control_fd, 1);
        fixture_turn(&fixture, EVENT_CONTROL);
        fixture_drain(&fixture);
    }
    CHECK(fixture.counters.requests > ROUNDS);
    CHECK(fixture.counters.failed_requests < fixture.counters.requests);
    fixture_deinit(&fixture);
    printf("%llu requests\n", (unsigned long long)fixture.counters.requests);
}

int main(void)
{
    endure(false);
    endure(true);
    return 0;
}
