#include "ring/inside.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>

#include "ring/assertion.h"
#include "ring/window.h"
#include "ring/word.h"

#define POLL_MILLISECONDS 1 /* between looks at a ring whose driver does not kick, or tries to hear of commands */

/* ---- life ---- */

/* Without an entry round_once tries again: a worker that hears of no command never ends. */
static void poll_control(struct worker *worker)
{
    struct io_uring_sqe *entry = uring_entry(&worker->uring);

    worker->control_unarmed = !entry;
    if (!entry)
        return;
    io_uring_prep_poll_multishot(entry, worker->control_fd, POLLIN);
    io_uring_sqe_set_data64(entry, TAG_CONTROL);
}

static void init_lists(struct worker *worker)
{
    for (uint32_t i = 0; i < WORKER_OPERATIONS; i++)
        worker->operations[i].next = i + 1;
    worker->free_operations = WORKER_OPERATIONS;
    worker->stalled = WORKER_OPERATIONS;
    for (uint32_t i = 0; i < LONG_PIECES; i++)
        worker->long_free[i] = worker->long_pieces + (size_t)i * CHAIN_PIECES_MAX;
    worker->free_long = LONG_PIECES;
    for (uint32_t i = 0; i < WORKER_QUEUES; i++) {
        worker->queues[i].index = i;
        worker->queues[i].kick_fd = worker->queues[i].call_fd = worker->queues[i].err_fd = -1;
    }
    line_init(&worker->grace.waiting);
    line_init(&worker->grace.served);
}

struct worker *worker_create(struct device *device, int control_fd, struct worker_counters *counters, int use_threads,
                             int *error)
{
    struct worker *worker = calloc(1, sizeof(*worker));
    struct worker_event *events = calloc(WORKER_EVENTS, sizeof(*events));
    struct iovec *long_pieces = calloc((size_t)LONG_PIECES * CHAIN_PIECES_MAX, sizeof(*long_pieces));
    int result = worker && events && long_pieces ? uring_init(&worker->uring, use_threads) : -ENOMEM;

    if (result < 0) {
        free(worker);
        free(events);
        free(long_pieces);
        *error = -result;
        return NULL;
    }
    worker->device = device;
    worker->counters = counters;
    worker->control_fd = control_fd;
    worker->thread_id = host_expect_nudges();
    worker->losses = worker->losses_judged = loss_count();
    worker->log.call_fd = -1;
    worker->events = events;
    worker->long_pieces = long_pieces;
    init_lists(worker);
    poll_control(worker);
    return worker;
}

/* ---- events ---- */

void worker_tell(struct worker *worker, struct worker_event event)
{
    /* Room for every operation, FETCH_EVENTS_MAX and a batch of requests, and a few for each queue and file. */
    if (worker->event_count == WORKER_EVENTS)
        abort();
    worker->events[worker->event_count++] = event;
}

struct worker_event *worker_events(struct worker *worker)
{
    return worker->events;
}

void worker_forget_delivered(struct worker *worker)
{
    uint32_t left = worker->event_count - worker->delivered;

    for (uint32_t i = 0; i < worker->delivered; i++) {
        if (worker->events[i].kind == EVENT_DONE)
            operation_free(worker, worker->events[i].id);
        else if (worker->events[i].kind == EVENT_CONTROL)
            worker->control_told = false;
    }
    memmove(worker->events, worker->events + worker->delivered, left * sizeof(*worker->events));
    worker->event_count = left;
    worker->delivered = 0;
}

/* ---- the loop ---- */

static void control_signalled(struct worker *worker, bool more)
{
    host_take_signal(worker->control_fd); /* or an earlier completion took it already */
    if (!more)
        poll_control(worker);
    if (worker->control_told)
        return;
    worker->control_told = true;
    worker_tell(worker, (struct worker_event){.kind = EVENT_CONTROL});
}

static void dispatch(struct worker *worker, const struct uring_completion *completion)
{
    uint64_t data = completion->user_data;
    uint32_t number = data >> 8 & 0xffffff, generation = data >> 32;

    switch ((enum tag)(data & 0xff)) {
    case TAG_OPERATION:
        operation_completed(worker, number, completion->result);
        break;
    case TAG_SYNC:
        commit_completed(worker, number, completion->result);
        break;
    case TAG_KICK:
        queue_kicked(worker, number, generation, completion->result, completion->more);
        break;
    case TAG_CONTROL:
        control_signalled(worker, completion->more);
        break;
    case TAG_NOTHING:
        break;
    }
}

static void reap(struct worker *worker)
{
    struct uring_completion completions[64];
    uint32_t count, total = 0;

    do {
        count = uring_reap(&worker->uring, completions, 64);
        total += count;
        if (count)
            worker->now = pace_now();
        for (uint32_t i = 0; i < count; i++)
            dispatch(worker, &completions[i]);
        worker->progress |= count > 0;
    } while (count == 64 && total < URING_COMPLETIONS); /* who kicks many queues without end gets a turn, no more */
}

static int round_once(struct worker *worker)
{
    worker->progress = false;
    worker->busy_nbytes -= worker->returned_nbytes;
    worker->returned_nbytes = 0;
    reap(worker);
    operations_retry(worker);
    if (worker->control_unarmed)
        poll_control(worker);
    operations_tell_room(worker);
    queues_fetch(worker);
    commits_start(worker);
    grace_advance(worker);
    queues_publish(worker);
    return uring_submit(&worker->uring);
}

/* Whether to go on looking: only the driver could be the next to move, and it lately did so soon. */
static bool looks_on(struct worker *worker)
{
    if (worker->submitted || worker->requests_in_flight || !worker->active_count || !poll_again(&worker->poll))
        return false;
    worker->counters->polls++;
    return true;
}

static int sleep_for_work(struct worker *worker)
{
    int result;

    ASSERT(!worker->dirty_count && !worker->event_count);
    poll_sleeps(&worker->poll);
    result = uring_wait(&worker->uring, queues_poll(worker) || worker->control_unarmed ? POLL_MILLISECONDS : 0);
    poll_woke(&worker->poll);
    return result;
}

int worker_run(struct worker *worker)
{
    worker_forget_delivered(worker);
    worker->at_once = WORKER_AT_ONCE;
    for (;;) {
        int result = round_once(worker);

        if (result < 0)
            return result;
        if (worker->event_count)
            break;
        if (worker->progress) {
            poll_found(&worker->poll);
            continue;
        }
        if (looks_on(worker) || queues_arm(worker) || worker->event_count)
            continue;
        result = sleep_for_work(worker);
        if (result < 0)
            return result;
    }
    worker->delivered = worker->event_count;
    worker->round++;
    worker->counters->crossings++;
    worker->counters->python_events += worker->event_count;
    return worker->event_count;
}

static void forget_mappings(struct file *file)
{
    word_forget(file);
    window_close(file);
}

void worker_close(struct worker *worker)
{
    turns_forget(worker);
    while (worker->submitted) {
        worker->event_count = worker->delivered = 0;
        reap(worker);
        if (uring_submit(&worker->uring) < 0 || (worker->submitted && uring_wait(&worker->uring, 0) < 0))
            break;
    }
    for (uint32_t i = 0; i < WORKER_QUEUES; i++)
        queue_close(worker, &worker->queues[i]);
    worker_set_log_call(worker, -1);
    uring_deinit(&worker->uring);
    for (uint32_t slot = 0; slot < worker->file_count; slot++)
        forget_mappings(&worker->files[slot]);
    worker->file_count = 0;
    worker->free_operation = WORKER_OPERATIONS;
}

void worker_free(struct worker *worker)
{
    for (uint32_t i = 0; i < worker->idle_bounces; i++)
        free(worker->bounces[i]);
    free(worker->events);
    free(worker->long_pieces);
    free(worker);
}

void worker_nudge(struct worker *worker)
{
    if (worker && __atomic_load_n(&worker->at_peer, __ATOMIC_RELAXED))
        host_nudge(worker->thread_id);
}

void worker_set_poll(struct worker *worker, uint32_t microseconds)
{
    worker->poll = (struct poll){.limit = microseconds * UINT64_C(1000)};
}

void worker_pause(struct worker *worker, int paused)
{
    worker->paused = paused;
    worker->idle_owed = paused && worker->requests_in_flight;
}

const struct worker_statistics *worker_statistics(struct worker *worker)
{
    return &worker->statistics;
}

/* Whether bytes at `host` lie in the region. */
static bool is_inside(const struct guest_region *region, const void *host)
{
    uintptr_t first = (uintptr_t)region->host;

    return (uintptr_t)host >= first && (uintptr_t)host - first < region->nbytes;
}

static bool request_uses(const struct request *request, const struct guest_region *region)
{
    for (uint32_t i = 0; i < request->readable_count + request->writable_count; i++)
        if (is_inside(region, request->pieces[i].iov_base))
            return true;
    return false;
}

/* Whether a part of the ring lies in the region: addresses of rings are the front-end's own. */
static bool ring_uses(const struct virtqueue_layout *layout, const struct guest_region *region)
{
    return layout->descriptor_address - region->user_address < region->nbytes ||
           layout->driver_address - region->user_address < region->nbytes ||
           layout->device_address - region->user_address < region->nbytes;
}

static void await_requests(struct worker *worker, struct queue *queue, const struct guest_region *region)
{
    bool whole = ring_uses(&queue->layout, region);

    for (uint32_t head = 0; head < queue->layout.size; head++) {
        struct request *request = &queue->requests[head];

        if (request->state == REQUEST_FREE || request->awaited || !(whole || request_uses(request, region)))
            continue;
        request->awaited = true;
        worker->awaited++;
    }
}

void worker_await_region(struct worker *worker, const struct guest_region *region)
{
    for (uint32_t i = 0; i < WORKER_QUEUES; i++)
        if (worker->queues[i].in_flight)
            await_requests(worker, &worker->queues[i], region);
}

uint32_t worker_awaited(struct worker *worker)
{
    return worker->awaited;
}

uint32_t worker_requests_in_flight(struct worker *worker)
{
    return worker->requests_in_flight;
}

void worker_set_trace(struct worker *worker, struct trace *trace)
{
    worker->trace = trace;
}

/* ---- files ---- */

void worker_look_at(int fd, int direct_fd, struct file_traits *traits)
{
    *traits = (struct file_traits){storage_of(fd), {4096, 4096}};
    if (direct_fd >= 0)
        traits->alignment = host_alignment(direct_fd);
}

int worker_add_file(struct worker *worker, int fd, int direct_fd, int sync, const struct file_traits *traits)
{
    uint32_t slot = 0;
    struct file *file;

    while (worker_has_slot(worker, slot))
        slot++;
    if (slot == WORKER_FILES)
        return -EMFILE;
    file = &worker->files[slot];
    *file = (struct file){.fd = fd, .direct_fd = direct_fd, .syncs = sync, .storage = traits->storage};
    file->first_waiting = WORKER_OPERATIONS;
    file->dirty = UINT32_MAX; /* who knows what others have written */
    line_init(&file->waiting);
    line_init(&file->served);
    file->memory_align = traits->alignment.memory;
    file->offset_align = traits->alignment.offset;
    if (file->offset_align > 512)
        file->direct_fd = -1; /* a guest's sector is less: its page would be written both ways */
    if (slot == worker->file_count)
        worker->file_count++;
    return slot;
}

int worker_is_near(struct worker *worker, uint32_t slot)
{
    return worker_has_slot(worker, slot) && storage_is_near(worker->files[slot].storage);
}

void worker_remove_file(struct worker *worker, uint32_t slot)
{
    forget_mappings(&worker->files[slot]);
    worker->files[slot].fd = -1;
}
