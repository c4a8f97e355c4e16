/* Packed rings and in-flight regions full of noise, region and ring changed at any time: nothing outside is touched.
 *
 * The region ends at a page that may not be touched, and some of it is plausible, so that recovery gets far.
 */
#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>

#include "tests/c/fixture.h"

#define ROUNDS 20000

static uint64_t state = 0x2545f4914f6cdd1d;

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

/* The in-flight region of one queue, its last byte before a page without access. */
static uint8_t *new_region(uint64_t nbytes)
{
    uint64_t page = sysconf(_SC_PAGESIZE), length = (nbytes + page - 1) / page * page;
    uint8_t *mapping = mmap(NULL, length + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    CHECK(mapping != MAP_FAILED);
    CHECK(mprotect(mapping + length, page, PROT_NONE) == 0);
    return mapping + length - nbytes;
}

static uint16_t small(void)
{
    return often() ? noise() % QUEUE_SIZE : noise();
}

static void scramble_split(struct inflight_split *region)
{
    *region = (struct inflight_split){
        .version = often(),
        .desc_num = QUEUE_SIZE,
        .last_batch_head = small(),
        .used_idx = often() ? 0 : -(noise() % (2 * QUEUE_SIZE)),
    };
    for (uint32_t i = 0; i < QUEUE_SIZE; i++)
        region->desc[i] = (struct inflight_split_entry){
            .inflight = noise() % 2, .next = small(), .counter = noise()};
}

/* A tidy region with two chains in flight, then a few of its fields changed. */
static void scramble_packed(struct inflight_packed *region)
{
    uint16_t first = noise() % 4 + 1, second = noise() % 4 + 1;

    memset(region, 0, sizeof(*region) + QUEUE_SIZE * sizeof(*region->desc));
    region->version = often();
    region->desc_num = QUEUE_SIZE;
    region->free_head = region->old_free_head = first + second;
    region->used.used_wrap_counter = region->used.old_used_wrap_counter = 1;
    for (uint32_t i = 0; i < QUEUE_SIZE; i++)
        region->desc[i] = (struct inflight_packed_entry){
            .next = i + 1, .id = i, .len = 16, .addr = 131072 + 512 * (noise() % 1024), .flags = noise() & 3};
    region->desc[0].inflight = region->desc[first].inflight = 1;
    region->desc[0].num = first;
    region->desc[0].last = first - 1;
    region->desc[first].num = second;
    region->desc[first].last = first + second - 1;
    for (uint32_t i = noise() % 4; i; i--)
        ((uint16_t *)region)[noise() % (often() ? 150 : 16 + 16 * QUEUE_SIZE)] = small();
}

static void scramble_ring(struct fixture *fixture, bool packed)
{
    uint8_t *host = fixture->region.host;
    struct vring_packed_desc *cells = (void *)host;
    struct vring_desc *table = (void *)host;
    struct vring_avail *available = (void *)(host + driver_ring_driver_offset(QUEUE_SIZE));

    for (uint32_t i = 0; i < QUEUE_SIZE; i++) {
        uint64_t address = often() ? 131072 + 512 * (noise() % 1024) : noise();
        uint32_t nbytes = often() ? 16 + noise() % 3 * 512 : noise();
        uint16_t flags = often() ? noise() & 3 : noise();
        if (packed)
            cells[i] = (struct vring_packed_desc){address, nbytes, small(), flags | (often() ? 1 << 7 : 0)};
        else
            table[i] = (struct vring_desc){address, nbytes, flags, small()};
        if (!packed)
            available->ring[i] = small();
    }
    available->idx = noise() % (QUEUE_SIZE + 1);
    for (uint32_t at = 131072; at < MEMORY_NBYTES; at += 512) {
        struct virtio_blk_outhdr header = {noise() % 16, 0, often() ? noise() % 2048 : noise()};
        memcpy(host + at, &header, sizeof(header));
    }
}

static void torment(bool packed)
{
    struct fixture fixture;
    uint64_t nbytes = inflight_nbytes(QUEUE_SIZE, packed);
    uint8_t *region = new_region(nbytes);
    uint32_t broken = 0;

    fixture_init(&fixture, false);
    for (int i = 0; i < ROUNDS; i++) {
        memset(fixture.region.host, 0, driver_ring_nbytes(QUEUE_SIZE));
        if (packed)
            scramble_packed((void *)region);
        else
            scramble_split((void *)region);
        scramble_ring(&fixture, packed);
        CHECK(worker_set_inflight(fixture.worker, region, nbytes, 1) == 0);
        fixture_start(&fixture, (packed ? RING_PACKED : 0) | (i & 1 ? RING_EVENT_IDX : 0));
        if (i & 2) { /* the peer goes on scribbling after recovery */
            if (packed)
                scramble_packed((void *)region);
            else
                scramble_split((void *)region);
        }
        eventfd_write(fixture.control_fd, 1);
        fixture_turn(&fixture, EVENT_CONTROL);
        broken += *worker_queue_fault(fixture.worker, 0) != 0;
        fixture_drain(&fixture);
    }
    CHECK(fixture.counters.requests > ROUNDS / 4);
    CHECK(broken > ROUNDS / 100 && broken < ROUNDS);
    printf("%s: %llu requests, %u broken rings\n", packed ? "packed" : "split",
           (unsigned long long)fixture.counters.requests, broken);
    CHECK(worker_set_inflight(fixture.worker, NULL, 0, 0) == 0);
    fixture_deinit(&fixture);
}

int main(void)
{
    torment(false);
    torment(true);
    return 0;
}
