/* Driver and device on two cores, each asleep whenever it can be: nobody may sleep through the other's last word. */
#include <linux/virtio_blk.h>
#include <poll.h>
#include <pthread.h>

#include "tests/c/fixture.h"

#define REQUESTS 20000u
#define TIMEOUT_MS 20000
#define SLOT_ADDRESS 131072u /* of the first request: header, data, status */
#define SLOT_NBYTES 1024u

struct duel {
    struct fixture fixture;
    pthread_barrier_t started;
    int kick_fd;
    int call_fd;
    uint32_t ring_flags;
    bool use_threads;
};

static void *run_device(void *argument)
{
    struct duel *duel = argument;
    struct fixture *fixture = &duel->fixture;

    fixture_init(fixture, duel->use_threads); /* on this thread, which the io_uring belongs to from here on */
    CHECK(worker_start_queue(fixture->worker, 0, QUEUE_SIZE, 0, driver_ring_driver_offset(QUEUE_SIZE),
                             driver_ring_device_offset(QUEUE_SIZE), fixture_base(duel->ring_flags),
                             duel->ring_flags) == 0);
    CHECK(worker_set_call(fixture->worker, 0, dup(duel->call_fd)) == 0);
    CHECK(worker_set_kick(fixture->worker, 0, dup(duel->kick_fd)) == 0);
    CHECK(worker_set_enabled(fixture->worker, 0, true) == 0);
    pthread_barrier_wait(&duel->started);
    while (!fixture_turn(fixture, EVENT_CONTROL))
        ;
    fixture_drain(fixture);
    return NULL;
}

static void post(struct duel *duel, struct driver_ring *ring, uint32_t slot)
{
    /* Without I/O the device answers, and looks for more, within the driver's next few instructions. */
    struct virtio_blk_outhdr header = {slot % 2 ? VIRTIO_BLK_T_IN : VIRTIO_BLK_T_GET_ID, 0, slot};
    uint64_t address = SLOT_ADDRESS + slot * SLOT_NBYTES;
    struct driver_buffer buffers[] = {{address, 16, false}, {address + 16, 512, true}, {address + 528, 1, true}};

    memcpy(duel->fixture.region.host + address, &header, sizeof(header));
    CHECK(driver_ring_add(ring, buffers, 3, NULL, 0) >= 0);
}

static void sleep_until_called(const struct duel *duel)
{
    struct pollfd pollfd = {.fd = duel->call_fd, .events = POLLIN};
    eventfd_t count;

    CHECK(poll(&pollfd, 1, TIMEOUT_MS) == 1);
    CHECK(eventfd_read(duel->call_fd, &count) == 0);
}

/* Look for a while before sleeping, then for a while do nothing: the two sides
 * must meet at every point of each other's last steps. */
static int poll_for_a_while(struct driver_ring *ring, uint32_t *nbytes)
{
    static uint64_t state = 0x2545f4914f6cdd1d;
    int head = -1;

    state = state * 6364136223846793005u + 1442695040888963407u;
    for (uint32_t look = state >> 33 & 2047; look && head < 0; look--)
        head = driver_ring_poll(ring, nbytes);
    for (volatile uint32_t wait = state >> 48 & 511; wait; wait--)
        ;
    return head >= 0 ? head : driver_ring_poll(ring, nbytes);
}

static void drive(struct duel *duel, uint32_t depth)
{
    struct driver_ring ring;
    uint32_t nbytes, in_flight = 0;

    driver_ring_init(&ring, duel->fixture.region.host, QUEUE_SIZE, duel->ring_flags,
                     fixture_base(duel->ring_flags));
    for (uint32_t done = 0; done < REQUESTS;) {
        for (; in_flight < depth; in_flight++)
            post(duel, &ring, in_flight);
        if (driver_ring_publish(&ring))
            CHECK(eventfd_write(duel->kick_fd, 1) == 0);
        if (poll_for_a_while(&ring, &nbytes) >= 0) {
            in_flight--;
            done++;
        } else if (!driver_ring_arm(&ring)) {
            sleep_until_called(duel);
        }
    }
}

static void fight(uint32_t ring_flags, bool use_threads, uint32_t depth)
{
    struct duel duel = {.ring_flags = ring_flags, .use_threads = use_threads};
    pthread_t device;

    duel.kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    duel.call_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pthread_barrier_init(&duel.started, NULL, 2);
    CHECK(pthread_create(&device, NULL, run_device, &duel) == 0);
    pthread_barrier_wait(&duel.started);
    drive(&duel, depth);
    CHECK(eventfd_write(duel.fixture.control_fd, 1) == 0);
    CHECK(pthread_join(device, NULL) == 0);
    pthread_barrier_destroy(&duel.started);
    close(duel.kick_fd);
    close(duel.call_fd);
    fixture_deinit(&duel.fixture);
}

int main(void)
{
    static const uint32_t all_flags[] = {0, RING_EVENT_IDX, RING_PACKED, RING_PACKED | RING_EVENT_IDX};

    for (uint32_t depth = 1; depth <= 4; depth++) {
        for (size_t i = 0; i < sizeof(all_flags) / sizeof(*all_flags); i++) {
            fight(all_flags[i], false, depth);
            fight(all_flags[i], true, depth);
        }
    }
    return 0;
}
