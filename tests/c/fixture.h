/* A worker, a memory and a ring in one thread: what the C programs of this directory stand on. */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "bench/driver.h"
#include "bench/identity.h"
#include "ring/inside.h"
#include "virtio/block.h"

#define CHECK(claim)                                                                                                   \
    do {                                                                                                               \
        if (!(claim)) {                                                                                                \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #claim);                                     \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

#define MEMORY_NBYTES (1u << 20)
#define DISK_NBYTES (1u << 20)
#define QUEUE_SIZE 64u
#define TRACE_NBYTES (1u << 18) /* some programs fill it, some do not */

struct fixture {
    struct block block;
    struct worker_counters counters;
    struct worker *worker;
    struct trace *trace;
    struct guest_region region;
    struct identity_map map;
    int memory_fd;
    int disk_fd;
    int trace_fd;
    int control_fd;
};

static inline int new_memfd(const char *name, uint64_t nbytes)
{
    int fd = memfd_create(name, MFD_CLOEXEC);

    CHECK(fd >= 0);
    CHECK(ftruncate(fd, nbytes) == 0);
    return fd;
}

/* A worker with one memory region at guest and user address 0, and a file. The
 * ring is at 0; it is not started. */
static inline void fixture_init(struct fixture *fixture, bool use_threads)
{
    static struct guest_memory memory;
    struct file_traits traits;
    int error = 0;

    memset(fixture, 0, sizeof(*fixture));
    memset(&memory, 0, sizeof(memory));
    fixture->memory_fd = new_memfd("guest", MEMORY_NBYTES);
    fixture->disk_fd = new_memfd("disk", DISK_NBYTES);
    fixture->control_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    block_init(&fixture->block);
    fixture->block.size = DISK_NBYTES;
    fixture->block.max_range_sectors = 32768;
    fixture->worker = worker_create(&fixture->block.device, fixture->control_fd, &fixture->counters, use_threads,
                                    &error);
    CHECK(fixture->worker);
    fixture->trace_fd = new_memfd("trace", 0);
    fixture->trace = trace_create(fixture->trace_fd, TRACE_NBYTES);
    CHECK(fixture->trace);
    worker_set_trace(fixture->worker, fixture->trace);
    CHECK(guest_region_map(&fixture->region, fixture->memory_fd, 0, 0, MEMORY_NBYTES, 0) == 0);
    CHECK(guest_memory_add(&memory, &fixture->region) == 0);
    worker_set_memory(fixture->worker, &memory);
    fixture->map = (struct identity_map){.nbytes = DISK_NBYTES, .writable = true};
    worker_look_at(fixture->disk_fd, -1, &traits);
    fixture->map.slot = fixture->block.sync_slot = worker_add_file(fixture->worker, fixture->disk_fd, -1, true, &traits);
    block_set_extent_map(&fixture->block, identity_map_translate_address(), (uintptr_t)&fixture->map, 0);
}

static inline void fixture_deinit(struct fixture *fixture)
{
    worker_close(fixture->worker);
    worker_free(fixture->worker);
    trace_close(fixture->trace);
    CHECK(lseek(fixture->trace_fd, 0, SEEK_END) <= TRACE_NBYTES);
    guest_region_unmap(&fixture->region);
    close(fixture->memory_fd);
    close(fixture->disk_fd);
    close(fixture->trace_fd);
    close(fixture->control_fd);
}

/* Where a new ring begins. */
static inline uint32_t fixture_base(uint32_t ring_flags)
{
    return ring_flags & RING_PACKED ? 0x80008000 : 0;
}

/* Start queue 0 on the ring at guest address 0, polled rather than kicked. */
static inline void fixture_start(struct fixture *fixture, uint32_t ring_flags)
{
    uint32_t base = fixture_base(ring_flags);

    CHECK(worker_start_queue(fixture->worker, 0, QUEUE_SIZE, 0, driver_ring_driver_offset(QUEUE_SIZE),
                             driver_ring_device_offset(QUEUE_SIZE), base, ring_flags) == 0);
    CHECK(worker_set_kick(fixture->worker, 0, -1) == 0);
    CHECK(worker_set_enabled(fixture->worker, 0, true) == 0);
}

/* Run until there is an event; finish what reaches Python's side with OK. */
static inline int fixture_turn(struct fixture *fixture, uint32_t awaited)
{
    int count = worker_run(fixture->worker), seen = 0;

    CHECK(count > 0);
    for (int i = 0; i < count; i++) {
        struct worker_event event = worker_events(fixture->worker)[i];
        if (event.kind == EVENT_REQUEST)
            CHECK(worker_finish(fixture->worker, event.id, 0) == 0);
        seen += event.kind == awaited;
    }
    return seen;
}

/* Wake the worker and serve what is posted until nothing is left in flight. */
static inline void fixture_serve(struct fixture *fixture)
{
    do {
        eventfd_write(fixture->control_fd, 1);
        while (!fixture_turn(fixture, EVENT_CONTROL))
            ;
    } while (worker_requests_in_flight(fixture->worker));
}

static inline void fixture_drain(struct fixture *fixture)
{
    CHECK(worker_drain_queue(fixture->worker, 0) == 0);
    while (!fixture_turn(fixture, EVENT_DRAINED))
        ;
}
