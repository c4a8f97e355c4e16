/* A driver that changes its ring while it is read: descriptors, heads, the index, tables, headers, all the time.
 *
 * What was checked must be what is used. Guest memory lies between canaries; whatever is served, the device sees
 * pieces that lie in it, and nothing else is written.
 */
#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>
#include <pthread.h>

#include "tests/c/fixture.h"

#define ROUNDS 20000
#define CANARY_NBYTES 8192u
#define CANARY 0xc5
#define TABLE 65536u   /* an indirect table of 64 descriptors */
#define HEADERS 131072u

static uint8_t *arena;
static struct guest_region region;
static void (*block_begin)(struct device *device, struct worker *worker, struct request *request);
static uint64_t served;
static bool is_over;

static uint64_t noise(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* As another processor would: eight bytes at a time, or two. */
static void put64(uint32_t offset, uint64_t value)
{
    __atomic_store_n((uint64_t *)(void *)(region.host + offset), value, __ATOMIC_RELAXED);
}

static void put16(uint32_t offset, uint16_t value)
{
    __atomic_store_n((uint16_t *)(void *)(region.host + offset), value, __ATOMIC_RELAXED);
}

/* One of two descriptions that are each sound, or not at all; the worker may see a half of either. */
static void change_descriptor(uint32_t offset, uint64_t *state)
{
    uint64_t value = noise(state);
    bool is_wild = value % 64 == 0;
    uint64_t address = is_wild ? value : value & 1 ? MEMORY_NBYTES - 512 : HEADERS + 512 * (value >> 8 & 255);
    uint32_t length = is_wild ? value >> 32 : value & 1 ? 512 : 16;
    uint16_t flags = value >> 40 & 15 ? (value & 2 ? VRING_DESC_F_WRITE : VRING_DESC_F_NEXT) : value >> 16 & 7;

    if (flags & VRING_DESC_F_INDIRECT) {
        address = TABLE;
        length = 1024;
    }
    put64(offset, address);
    put64(offset + 8, length | (uint64_t)flags << 32 | (value >> 20 & (is_wild ? 0xffff : 63)) << 48);
}

static void *race(void *argument)
{
    uint64_t state = 0x2545f4914f6cdd1d;
    uint32_t driver = driver_ring_driver_offset(QUEUE_SIZE);

    while (!__atomic_load_n(&is_over, __ATOMIC_RELAXED)) {
        uint32_t which = noise(&state) % QUEUE_SIZE;

        change_descriptor(16 * which, &state);
        change_descriptor(TABLE + 16 * (noise(&state) % 64), &state);
        put16(driver + 4 + 2 * which, noise(&state) % 512 ? noise(&state) % QUEUE_SIZE : noise(&state));
        put64(HEADERS + 512 * (noise(&state) % 256), noise(&state) % 16);
        put64(HEADERS + 512 * (noise(&state) % 256) + 8, noise(&state) % 2048);
        if (noise(&state) % 4096 == 0)
            put16(driver + 2, noise(&state)); /* the index */
    }
    return argument;
}

static void watched_begin(struct device *device, struct worker *worker, struct request *request)
{
    for (uint32_t i = 0; i < request->readable_count + request->writable_count; i++) {
        const uint8_t *start = request->pieces[i].iov_base;
        CHECK(start >= region.host && request->pieces[i].iov_len <= (uint64_t)(region.host + region.nbytes - start));
    }
    served++;
    block_begin(device, worker, request);
}

static void lay_out(struct fixture *fixture)
{
    static struct guest_memory memory;
    uint64_t nbytes = MEMORY_NBYTES + 2 * CANARY_NBYTES;

    arena = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(arena != MAP_FAILED);
    memset(arena, CANARY, CANARY_NBYTES);
    memset(arena + nbytes - CANARY_NBYTES, CANARY, CANARY_NBYTES);
    region = (struct guest_region){.nbytes = MEMORY_NBYTES, .host = arena + CANARY_NBYTES};
    CHECK(guest_memory_add(&memory, &region) == 0);
    worker_set_memory(fixture->worker, &memory);
    block_begin = fixture->block.device.begin;
    fixture->block.device.begin = watched_begin;
}

static void check_canaries(void)
{
    for (uint32_t i = 0; i < CANARY_NBYTES; i++)
        CHECK(arena[i] == CANARY && region.host[region.nbytes + i] == CANARY);
}

int main(void)
{
    uint32_t driver = driver_ring_driver_offset(QUEUE_SIZE);
    struct fixture fixture;
    uint32_t broken = 0;
    pthread_t racer;

    fixture_init(&fixture, false);
    lay_out(&fixture);
    CHECK(pthread_create(&racer, NULL, race, NULL) == 0);
    for (int i = 0; i < ROUNDS; i++) {
        fixture_start(&fixture, i & 1);
        fixture.block.writethrough = i & 2;
        put16(driver + 2, i % (QUEUE_SIZE + 1)); /* so many heads, if nobody says another number first */
        eventfd_write(fixture.control_fd, 1);
        fixture_turn(&fixture, EVENT_CONTROL);
        broken += worker_queue_fault(fixture.worker, 0)[0] != 0;
        fixture_drain(&fixture);
    }
    __atomic_store_n(&is_over, true, __ATOMIC_RELAXED);
    CHECK(pthread_join(racer, NULL) == 0);
    check_canaries();
    CHECK(served > ROUNDS / 2 && broken > 0 && broken < ROUNDS);
    fixture_deinit(&fixture);
    CHECK(munmap(arena, MEMORY_NBYTES + 2 * CANARY_NBYTES) == 0);
    printf("%llu requests, %u of %d rings broken\n", (unsigned long long)served, broken, ROUNDS);
    return 0;
}
