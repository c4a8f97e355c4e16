#include "bench/load.h"

#include <errno.h>
#include <linux/virtio_blk.h>
#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "bench/content.h"
#include "bench/pattern.h"

#define SECOND 1000000000ull
#define STALL (30 * SECOND)
#define PAGE 4096u

/* What a request shares with the device, besides its data. */
struct control {
    struct virtio_blk_outhdr header;
    struct virtio_blk_discard_write_zeroes segment;
    uint8_t status;
    uint8_t indirect[3 * 16] __attribute__((aligned(16)));
};

struct slot {
    struct slot *next_free;
    enum load_kind kind;
    uint64_t guest_offset;
    uint64_t submitted; /* when, nanoseconds */
    uint32_t oldest;    /* generation a read must see at least */
};

struct queue {
    struct load_queue given;
    struct slot *free;
    struct slot *by_head[DRIVER_SIZE_MAX];
};

struct load {
    struct load_job job;
    struct pattern pattern;
    struct content content;
    struct load_counts counts;
    uint8_t *host;
    uint64_t guest_address;
    uint64_t reset;           /* when */
    uint64_t last_completion; /* when */
    uint32_t in_flight;
    uint32_t unflushed; /* writes since the last flush */
    bool exhausted;
    struct slot *slots;
    struct queue queues[];
};

static uint64_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * SECOND + (uint64_t)time.tv_nsec;
}

/* ---- memory: all controls, then all data */

static uint64_t slot_count(const struct load_job *job)
{
    return (uint64_t)job->queue_count * job->depth;
}

static uint64_t round_up(uint64_t nbytes)
{
    return (nbytes + PAGE - 1) & ~(uint64_t)(PAGE - 1);
}

static uint64_t control_offset(const struct load *load, const struct slot *slot)
{
    return (uint64_t)(slot - load->slots) * sizeof(struct control);
}

static uint64_t data_offset(const struct load *load, const struct slot *slot)
{
    return round_up(slot_count(&load->job) * sizeof(struct control)) +
           (uint64_t)(slot - load->slots) * round_up(load->job.block_size);
}

uint64_t load_memory_nbytes(const struct load_job *job)
{
    return round_up(slot_count(job) * sizeof(struct control)) + slot_count(job) * round_up(job->block_size);
}

/* Not zeros: a server may treat them specially. */
static void fill_data(struct load *load)
{
    uint8_t *data = load->host + data_offset(load, load->slots);
    uint64_t nbytes = slot_count(&load->job) * round_up(load->job.block_size);

    for (uint64_t at = 0; at < nbytes; at += 8) {
        uint64_t bits = pattern_random(&load->pattern, UINT64_MAX);
        memcpy(data + at, &bits, 8);
    }
}

/* ---- life */

static void init_queues(struct load *load, const struct load_queue *queues)
{
    struct slot *slot = load->slots;

    for (uint32_t i = 0; i < load->job.queue_count; i++) {
        load->queues[i].given = queues[i];
        for (uint32_t j = 0; j < load->job.depth; j++, slot++) {
            slot->next_free = load->queues[i].free;
            load->queues[i].free = slot;
        }
    }
}

struct load *load_create(const struct load_job *job, const struct load_queue *queues, uint8_t *host,
                         uint64_t guest_address)
{
    struct load *load = calloc(1, sizeof(*load) + job->queue_count * sizeof(struct queue));

    if (!load)
        return NULL;
    load->job = *job;
    load->host = host;
    load->guest_address = guest_address;
    load->slots = calloc(slot_count(job), sizeof(*load->slots));
    if (!load->slots || (job->verify && content_init(&load->content, job->start, job->nbytes, job->block_size,
                                                     job->seed) < 0)) {
        load_destroy(load);
        return NULL;
    }
    pattern_init(&load->pattern, job->order, job->start, job->nbytes, job->block_size, job->stride, job->seed);
    init_queues(load, queues);
    fill_data(load);
    load_reset(load);
    return load;
}

void load_destroy(struct load *load)
{
    content_deinit(&load->content);
    free(load->slots);
    free(load);
}

void load_reset(struct load *load)
{
    memset(&load->counts, 0, sizeof(load->counts));
    load->reset = load->last_completion = now();
}

const struct load_counts *load_counts(const struct load *load)
{
    return &load->counts;
}

/* ---- submission */

static bool is_flush_due(const struct load *load)
{
    return load->job.flush_every && load->unflushed >= load->job.flush_every;
}

/* -> false: everything was visited. */
static bool choose(struct load *load, struct slot *slot)
{
    if (is_flush_due(load)) {
        load->unflushed = 0;
        slot->kind = LOAD_FLUSH;
        slot->guest_offset = 0;
        return true;
    }
    slot->kind = pattern_random(&load->pattern, 100) < load->job.read_percent ? LOAD_READ : load->job.kind;
    do {
        if (!pattern_next(&load->pattern, &slot->guest_offset))
            return false;
    } while (load->job.verify && slot->kind == LOAD_WRITE && content_is_busy(&load->content, slot->guest_offset));
    load->unflushed += slot->kind == LOAD_WRITE;
    return true;
}

static void stamp(struct load *load, struct slot *slot)
{
    if (slot->kind == LOAD_WRITE)
        content_issue(&load->content, slot->guest_offset, load->host + data_offset(load, slot));
    else if (slot->kind == LOAD_READ)
        slot->oldest = content_oldest(&load->content, slot->guest_offset);
}

static const uint32_t request_types[LOAD_KINDS] = {
    [LOAD_READ] = VIRTIO_BLK_T_IN,
    [LOAD_WRITE] = VIRTIO_BLK_T_OUT,
    [LOAD_FLUSH] = VIRTIO_BLK_T_FLUSH,
    [LOAD_DISCARD] = VIRTIO_BLK_T_DISCARD,
    [LOAD_WRITE_ZEROES] = VIRTIO_BLK_T_WRITE_ZEROES,
};

static bool has_segment(enum load_kind kind)
{
    return kind == LOAD_DISCARD || kind == LOAD_WRITE_ZEROES;
}

static void write_control(struct load *load, const struct slot *slot, struct control *control)
{
    uint64_t sector = slot->guest_offset / 512;

    control->header = (struct virtio_blk_outhdr){
        .type = request_types[slot->kind],
        .sector = has_segment(slot->kind) ? 0 : sector,
    };
    control->segment = (struct virtio_blk_discard_write_zeroes){
        .sector = sector,
        .num_sectors = load->job.block_size / 512,
    };
    control->status = 0xff;
}

/* -> the number of buffers. */
static uint32_t describe(const struct load *load, const struct slot *slot, struct driver_buffer *buffers)
{
    uint64_t control = load->guest_address + control_offset(load, slot);
    uint32_t count = 0;

    buffers[count++] = (struct driver_buffer){control, sizeof(struct virtio_blk_outhdr), 0};
    if (has_segment(slot->kind))
        buffers[count++] = (struct driver_buffer){
            control + offsetof(struct control, segment), sizeof(struct virtio_blk_discard_write_zeroes), 0};
    else if (slot->kind != LOAD_FLUSH)
        buffers[count++] = (struct driver_buffer){
            load->guest_address + data_offset(load, slot), load->job.block_size, slot->kind == LOAD_READ};
    buffers[count++] = (struct driver_buffer){control + offsetof(struct control, status), 1, 1};
    return count;
}

static int submit(struct load *load, struct queue *queue, struct slot *slot)
{
    struct control *control = (struct control *)(void *)(load->host + control_offset(load, slot));
    uint64_t indirect = load->guest_address + control_offset(load, slot) + offsetof(struct control, indirect);
    struct driver_buffer buffers[3];
    uint32_t count = describe(load, slot, buffers);
    int head;

    write_control(load, slot, control);
    slot->submitted = now();
    head = driver_ring_add(queue->given.ring, buffers, count, load->job.indirect ? control->indirect : NULL, indirect);
    if (head < 0)
        return head;
    queue->by_head[head] = slot;
    load->in_flight++;
    return 0;
}

/* -> requests submitted. */
static int fill_queue(struct load *load, struct queue *queue)
{
    int submitted = 0;

    while (queue->free && !load->exhausted) {
        struct slot *slot = queue->free;
        int error;
        if (!choose(load, slot)) {
            load->exhausted = true;
            break;
        }
        if (load->job.verify)
            stamp(load, slot);
        error = submit(load, queue, slot);
        if (error < 0)
            return error;
        queue->free = slot->next_free;
        submitted++;
    }
    if (driver_ring_publish(queue->given.ring)) {
        load->counts.kicks++;
        if (eventfd_write(queue->given.kick_fd, 1) < 0)
            return -errno;
    }
    return submitted;
}

/* ---- completion */

static void complete(struct load *load, struct slot *slot, uint64_t when)
{
    struct control *control = (struct control *)(void *)(load->host + control_offset(load, slot));
    const uint8_t *data = load->host + data_offset(load, slot);

    load->counts.completed[slot->kind]++;
    histogram_add(&load->counts.latencies[slot->kind], when - slot->submitted);
    if (control->status != VIRTIO_BLK_S_OK)
        load->counts.failed++;
    if (!load->job.verify)
        return;
    if (slot->kind == LOAD_WRITE)
        content_acknowledge(&load->content, slot->guest_offset);
    if (slot->kind == LOAD_READ && !content_is_right(&load->content, slot->guest_offset, slot->oldest, data))
        load->counts.corrupt++;
}

/* -> requests that came back. */
static int reap_queue(struct load *load, struct queue *queue)
{
    uint32_t nbytes;
    int reaped = 0;
    int head;

    while ((head = driver_ring_poll(queue->given.ring, &nbytes)) >= 0) {
        struct slot *slot = queue->by_head[head];
        if (!slot)
            return -EPROTO;
        queue->by_head[head] = NULL;
        load->last_completion = now();
        complete(load, slot, load->last_completion);
        slot->next_free = queue->free;
        queue->free = slot;
        load->in_flight--;
        reaped++;
    }
    return head == -EAGAIN ? reaped : head;
}

/* ---- the loop */

/* Reap and refill every queue. -> how much happened. */
static int turn(struct load *load)
{
    int moved = 0;

    for (uint32_t i = 0; i < load->job.queue_count; i++) {
        int reaped = reap_queue(load, &load->queues[i]);
        int submitted = reaped < 0 ? reaped : fill_queue(load, &load->queues[i]);
        if (submitted < 0)
            return submitted;
        moved += reaped + submitted;
    }
    return moved;
}

/* -> 1 if something came back meanwhile. */
static int arm(struct load *load)
{
    int arrived = 0;

    for (uint32_t i = 0; i < load->job.queue_count; i++)
        arrived |= driver_ring_arm(load->queues[i].given.ring);
    return arrived;
}

/* Sleep until the device calls, but not beyond `limit`. */
static int sleep_until(struct load *load, uint64_t limit)
{
    struct pollfd fds[2] = {{.fd = load->job.call_fd, .events = POLLIN}, {.fd = load->job.hangup_fd, .events = POLLIN}};
    uint64_t start = now();
    uint64_t nanoseconds = limit > start ? limit - start : 0;
    struct timespec timeout = {.tv_sec = (time_t)(nanoseconds / SECOND), .tv_nsec = (long)(nanoseconds % SECOND)};
    eventfd_t signals;

    if (arm(load))
        return 0;
    load->counts.sleeps++;
    if (ppoll(fds, 2, &timeout, NULL) < 0)
        return errno == EINTR ? 0 : -errno;
    if (fds[1].revents)
        return -EPIPE;
    if (fds[0].revents && eventfd_read(load->job.call_fd, &signals) < 0 && errno != EAGAIN)
        return -errno;
    return 0;
}

int load_run(struct load *load, uint64_t nanoseconds)
{
    uint64_t limit = now() + nanoseconds;

    while (now() < limit) {
        int moved = turn(load);
        load->counts.nanoseconds = load->last_completion - load->reset;
        if (moved < 0)
            return moved;
        if (load->in_flight == 0)
            return 1;
        if (moved == 0) {
            int error = sleep_until(load, limit);
            if (error < 0)
                return error;
        }
        if (now() - load->last_completion > STALL)
            return -ETIMEDOUT;
    }
    return 0;
}

int load_drain(struct load *load)
{
    int result = 0;

    load->exhausted = true;
    while (result == 0 && load->in_flight)
        result = load_run(load, SECOND);
    return result < 0 ? result : 0;
}
