/* The worker's queues: from the kick to the request, from the request to the call. */
#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/uio.h>

#include "ring/assertion.h"
#include "ring/share.h"
#include "ring/inside.h"

#define FETCH_ALONE 128       /* chains of one queue between two looks at what else there is to do, */
#define FETCH_TURN 32         /* and before the others have their turn: one that is refilled meanwhile would not end */
#define FETCH_SUBMIT 4        /* every so many chains the disk has something to do beside us */
#define FETCH_PUBLISH 16      /* every so many the driver hears what is done, to work beside us, and a sync may start */
#define FETCH_EVENTS_MAX 256  /* let Python catch up before popping more for it */

/* A queue that is drained still owes what an earlier daemon had fetched, enabled or not. */
static bool is_owing(const struct queue *queue)
{
    return queue->draining && queue->started && !queue->absent && virtqueue_has_pending(&queue->ring);
}

static bool is_served(const struct queue *queue)
{
    if (queue->draining)
        return is_owing(queue);
    return queue->started && !queue->absent && queue->enabled && queue->has_kick && !queue->ring.fault;
}

static void activate(struct worker *worker, struct queue *queue)
{
    if (queue->active || !is_served(queue))
        return;
    ASSERT(worker->active_count < WORKER_QUEUES);
    queue->active = true;
    worker->active[worker->active_count++] = queue;
}

static void deactivate(struct worker *worker, uint32_t position)
{
    ASSERT(position < worker->active_count && worker->active[position]->active);
    worker->active[position]->active = false;
    worker->active[position] = worker->active[--worker->active_count];
}

static void signal_fd(struct worker *worker, int fd)
{
    if (fd < 0)
        return;
    worker_meets_peer(worker, true);
    host_signal(fd);
    worker_meets_peer(worker, false);
}

static bool take_signal(struct worker *worker, int fd)
{
    bool taken;

    worker_meets_peer(worker, true);
    taken = host_take_signal(fd);
    worker_meets_peer(worker, false);
    return taken;
}

static void replace_fd(int *fd, int by)
{
    if (*fd >= 0)
        host_close(*fd);
    *fd = by;
}

static void break_queue(struct worker *worker, struct queue *queue, const char *fault)
{
    if (!queue->ring.fault)
        queue->ring.fault = fault;
    if (queue->broken)
        return;
    queue->broken = true;
    signal_fd(worker, queue->err_fd);
    worker_tell(worker, (struct worker_event){.kind = EVENT_BROKEN, .id = queue->index});
}

/* After shared memory was touched for this queue. What was read may be zeros that were never there. */
bool queue_has_lost(struct worker *worker, struct queue *queue)
{
    uint32_t losses = loss_count();

    if (losses == worker->losses)
        return false;
    worker->losses = losses;
    break_queue(worker, queue, "shared memory is gone: its file was truncated, or a page has a hardware error");
    return true;
}

/* Something was written to the device area; which of its few pages does not matter. */
static void log_device_area(struct worker *worker, const struct queue *queue)
{
    uint64_t guest_address;

    if (!worker->log.bits || !queue->logs)
        return;
    dirty_log_mark(&worker->log, queue->log_address, virtqueue_device_nbytes(&queue->ring));
    /* The used elements of a packed ring lie among the descriptors, of which the front-end gives no address. */
    if (queue->ring.packed && guest_memory_locate(&worker->memory, queue->ring.cells, &guest_address))
        dirty_log_mark(&worker->log, guest_address, 16 * (uint64_t)queue->ring.size);
}

static void call_log(struct worker *worker)
{
    if (worker->log.is_dirty)
        signal_fd(worker, worker->log.call_fd);
    worker->log.is_dirty = false;
}

static uint64_t room(uint64_t limit, uint64_t used)
{
    return used < limit ? limit - used : 0;
}

/* Whether the queue may have another request. What requests hold for as long as the disk likes is shared. */
static bool has_room(const struct worker *worker, const struct queue *queue)
{
    return share_allows(queue->operations, room(worker->free_operations, WORKER_ASIDE)) &&
           share_allows(queue->long_requests, worker->free_long) &&
           share_allows(queue->busy_nbytes, room(WORKER_BUSY_NBYTES, worker->busy_nbytes)) &&
           worker->event_count < FETCH_EVENTS_MAX && !worker->paused;
}

static void cancel_kick(struct worker *worker, struct queue *queue)
{
    struct io_uring_sqe *entry = queue->kick_fd >= 0 ? uring_entry(&worker->uring) : NULL;

    if (entry) {
        io_uring_prep_poll_remove(entry, tagged(TAG_KICK, queue->index, queue->kick_generation));
        io_uring_sqe_set_data64(entry, TAG_NOTHING);
    }
    queue->kick_generation++;
}

/* End the drain of a queue that is drained and has nothing left to do. */
static void finish_drain(struct worker *worker, struct queue *queue)
{
    uint32_t base = queue->started ? virtqueue_base(&queue->ring) : 0;

    if (!queue->draining || queue->in_flight || queue->dirty || is_owing(queue))
        return;
    ASSERT(!queue->operations && !queue->long_requests && !queue->busy_nbytes);
    cancel_kick(worker, queue);
    replace_fd(&queue->kick_fd, -1);
    replace_fd(&queue->call_fd, -1);
    free(queue->requests);
    queue->requests = NULL;
    virtqueue_deinit(&queue->ring);
    queue->has_kick = queue->started = queue->draining = false;
    worker_tell(worker, (struct worker_event){.kind = EVENT_DRAINED, .id = queue->index, .result = base});
}

static void tell_quiet(struct worker *worker, struct queue *queue)
{
    queue->quiet_owed = false;
    worker_tell(worker, (struct worker_event){.kind = EVENT_QUIET, .id = queue->index});
}

/* What was in flight has ended, and the driver has heard of it. */
static void finish_disabling(struct worker *worker, struct queue *queue)
{
    if (queue->quiet_owed && !queue->in_flight && !queue->dirty)
        tell_quiet(worker, queue);
}

/* ---- each round ---- */

void queue_show(struct worker *worker, struct queue *queue)
{
    virtqueue_show(&queue->ring);
    log_device_area(worker, queue);
    queue_has_lost(worker, queue);
    if (queue->dirty)
        return;
    ASSERT(worker->dirty_count < WORKER_QUEUES);
    queue->dirty = true;
    worker->dirty[worker->dirty_count++] = queue;
}

static void publish(struct worker *worker, struct queue *queue)
{
    bool calls = virtqueue_publish(&queue->ring);

    log_device_area(worker, queue);
    queue_has_lost(worker, queue);
    worker->counters->batches++;
    if (calls && queue->call_fd >= 0) {
        signal_fd(worker, queue->call_fd);
        worker->counters->calls++;
    }
}

void queues_publish(struct worker *worker)
{
    while (worker->dirty_count) {
        struct queue *queue = worker->dirty[--worker->dirty_count];

        ASSERT(queue->dirty && queue->started);
        queue->dirty = false;
        publish(worker, queue);
        worker->progress = true;
        finish_disabling(worker, queue);
        finish_drain(worker, queue);
    }
    call_log(worker);
    if (worker->idle_owed && !worker->requests_in_flight) {
        worker->idle_owed = false;
        worker_tell(worker, (struct worker_event){.kind = EVENT_IDLE});
    }
}

/* Let the disk and the driver work beside us, `count` chains after the first of a batch. */
static void share_work(struct worker *worker, uint32_t count)
{
    if (count % FETCH_SUBMIT == 0)
        uring_submit(&worker->uring); /* what it cannot take now is submitted at the end of the round */
    if (count % FETCH_SUBMIT == FETCH_SUBMIT - 1)
        commits_write_ahead(worker);
    if (count % FETCH_PUBLISH == 0)
        queues_publish(worker);
    if (count % FETCH_PUBLISH == FETCH_PUBLISH - 1)
        commits_start(worker);
}

static void fetch(struct worker *worker, struct queue *queue)
{
    uint32_t most = worker->active_count > 1 ? FETCH_TURN : FETCH_ALONE;

    for (uint32_t count = 0; count < most && is_served(queue) && has_room(worker, queue); count++) {
        int result = virtqueue_pop(&queue->ring, &worker->memory, &worker->chain);

        if (queue_has_lost(worker, queue))
            result = -EPROTO;
        if (result == 0) {
            queue->kicked_at = 0;
            return;
        }
        worker->progress = true;
        if (queue->kicked_at) {
            histogram_add(&worker->statistics.queues[queue->index].wait, worker->now - queue->kicked_at);
            queue->kicked_at = 0;
        }
        if (result > 0 && queue->requests[worker->chain.head].state != REQUEST_FREE) {
            queue->ring.fault = "a head is posted again while it is in flight";
            result = -EPROTO;
        }
        if (result < 0) {
            break_queue(worker, queue, NULL);
            finish_drain(worker, queue);
            return;
        }
        if (queue->armed) {
            virtqueue_disarm(&queue->ring);
            log_device_area(worker, queue);
            queue->armed = false;
        }
        request_begin(worker, queue, &worker->chain);
        share_work(worker, count);
    }
}

void queues_fetch(struct worker *worker)
{
    bool is_crowded = false;

    if (worker->active_count)
        worker->now = pace_now();
    for (uint32_t i = 0; i < worker->active_count; i++) {
        struct queue *queue = worker->active[(worker->first_active + i) % worker->active_count];

        fetch(worker, queue);
        is_crowded |= !has_room(worker, queue);
    }
    worker->first_active += is_crowded; /* who comes first may have taken it all; else turns are evenly apart */
}

bool queues_arm(struct worker *worker)
{
    bool more = false;

    for (uint32_t i = 0; i < worker->active_count;) {
        struct queue *queue = worker->active[i];
        bool available = false;

        if (is_served(queue)) {
            available = virtqueue_arm(&queue->ring);
            log_device_area(worker, queue);
            if (queue_has_lost(worker, queue))
                finish_drain(worker, queue); /* what it owes is not to be had any more */
        }
        queue->armed = true;
        more |= available && has_room(worker, queue);
        if (is_served(queue) && (available || queue->in_flight || queue->kick_fd < 0))
            i++;
        else
            deactivate(worker, i);
    }
    return more;
}

bool queues_poll(const struct worker *worker)
{
    for (uint32_t i = 0; i < worker->active_count; i++)
        if (worker->active[i]->kick_fd < 0)
            return true;
    return false;
}

/* ---- kicks ---- */

static void poll_kick(struct worker *worker, struct queue *queue)
{
    struct io_uring_sqe *entry = uring_entry(&worker->uring);

    if (!entry) {
        break_queue(worker, queue, "the kernel does not poll the kick");
        return;
    }
    io_uring_prep_poll_multishot(entry, queue->kick_fd, POLLIN);
    io_uring_sqe_set_data64(entry, tagged(TAG_KICK, queue->index, queue->kick_generation));
}

void queue_kicked(struct worker *worker, uint32_t index, uint32_t generation, int result, bool more)
{
    struct queue *queue = &worker->queues[index];

    if (generation != queue->kick_generation)
        return; /* of a kick that was replaced */
    if (result == -EMFILE || result == -ENFILE || result == -ENOMEM || result == -ENOSPC) {
        break_queue(worker, queue, "nothing is left to watch the kick with: descriptors, memory or epoll watches");
        return;
    }
    if (result < 0 || result & (POLLERR | POLLHUP | POLLNVAL)) {
        break_queue(worker, queue, "the kick is not an eventfd, or is closed");
        return;
    }
    if (!queue->kicked_at)
        queue->kicked_at = worker->now;
    /* Taken, so that the front-end does not find an old kick when it takes the fd back. */
    if (take_signal(worker, queue->kick_fd))
        worker->counters->kicks++;
    if (!more)
        poll_kick(worker, queue);
    activate(worker, queue);
}

/* ---- what Python says ---- */

int worker_set_inflight(struct worker *worker, void *region, uint64_t nbytes, uint32_t num_queues)
{
    if ((uintptr_t)region % 8 || (region && num_queues == 0))
        return -EINVAL;
    for (uint32_t i = 0; i < WORKER_QUEUES; i++)
        if (worker->queues[i].started)
            return -EBUSY;
    worker->inflight = region;
    worker->inflight_queues = num_queues;
    worker->inflight_nbytes = nbytes;
    return 0;
}

/* Give the layout its part of the in-flight region. -> false: there is one, without room for this ring. */
static bool find_inflight(const struct worker *worker, uint32_t index, struct virtqueue_layout *layout)
{
    uint64_t part;
    uint32_t entries;

    if (!worker->inflight)
        return true;
    part = inflight_part(worker->inflight_nbytes, worker->inflight_queues);
    entries = inflight_entries(part, layout->packed);
    if (index >= worker->inflight_queues || entries < layout->size)
        return false;
    layout->inflight = worker->inflight + index * part;
    layout->inflight_entries = entries;
    return true;
}

int worker_start_queue(struct worker *worker, uint32_t index, uint32_t size, uint64_t descriptor_address,
                       uint64_t driver_address, uint64_t device_address, uint32_t base, uint32_t ring_flags)
{
    struct queue *queue = &worker->queues[index];
    struct virtqueue_layout layout = {
        .size = size,
        .descriptor_address = descriptor_address,
        .driver_address = driver_address,
        .device_address = device_address,
        .base = base,
        .event_idx = ring_flags & RING_EVENT_IDX,
        .packed = ring_flags & RING_PACKED,
    };
    bool has_room;
    int result;

    if (index >= WORKER_QUEUES)
        return -EINVAL;
    if (queue->started || queue->draining)
        return -EBUSY;
    has_room = find_inflight(worker, index, &layout);
    result = virtqueue_init(&queue->ring, &layout, &worker->memory);
    if (result < 0) {
        signal_fd(worker, queue->err_fd);
        return result;
    }
    queue->requests = calloc(size, sizeof(*queue->requests));
    if (!queue->requests) {
        virtqueue_deinit(&queue->ring);
        return -ENOMEM;
    }
    queue->layout = layout;
    queue->started = true;
    queue->absent = queue->broken = false;
    queue->armed = true; /* nobody asked the driver not to kick yet */
    if (queue->ring.fault)
        break_queue(worker, queue, NULL);
    queue_has_lost(worker, queue);
    signal_fd(worker, queue->call_fd);
    activate(worker, queue);
    return has_room ? 0 : 1;
}

/* A file, for one, could keep whoever writes to it for ever, and is no place for our signals. */
static bool may_signal(int fd)
{
    return fd < 0 || host_is_waitable(fd);
}

static int refuse_fd(int fd)
{
    if (fd >= 0)
        host_close(fd);
    return -EINVAL;
}

int worker_set_kick(struct worker *worker, uint32_t index, int fd)
{
    struct queue *queue = &worker->queues[index];

    if (index >= WORKER_QUEUES || !may_signal(fd))
        return refuse_fd(fd);
    cancel_kick(worker, queue);
    replace_fd(&queue->kick_fd, fd);
    queue->has_kick = true;
    if (fd >= 0)
        poll_kick(worker, queue);
    activate(worker, queue);
    return 0;
}

int worker_set_call(struct worker *worker, uint32_t index, int fd)
{
    if (index >= WORKER_QUEUES || !may_signal(fd))
        return refuse_fd(fd);
    replace_fd(&worker->queues[index].call_fd, fd);
    if (worker->queues[index].started)
        signal_fd(worker, fd);
    return 0;
}

int worker_set_err(struct worker *worker, uint32_t index, int fd)
{
    if (index >= WORKER_QUEUES || !may_signal(fd))
        return refuse_fd(fd);
    replace_fd(&worker->queues[index].err_fd, fd);
    return 0;
}

int worker_set_enabled(struct worker *worker, uint32_t index, int enabled)
{
    struct queue *queue = &worker->queues[index];

    if (index >= WORKER_QUEUES)
        return -EINVAL;
    if (enabled && queue->quiet_owed)
        tell_quiet(worker, queue);
    queue->enabled = enabled;
    queue->quiet_owed = !enabled;
    activate(worker, queue);
    finish_disabling(worker, queue);
    return 0;
}

int worker_drain_queue(struct worker *worker, uint32_t index)
{
    struct queue *queue = &worker->queues[index];

    if (index >= WORKER_QUEUES)
        return -EINVAL;
    if (queue->draining)
        return -EALREADY;
    queue->draining = true;
    activate(worker, queue); /* if it owes something */
    finish_drain(worker, queue);
    return 0;
}

const char *worker_queue_fault(struct worker *worker, uint32_t index)
{
    const char *fault = index < WORKER_QUEUES ? worker->queues[index].ring.fault : NULL;

    return fault ? fault : "";
}

void worker_set_memory(struct worker *worker, const struct guest_memory *memory)
{
    queues_publish(worker); /* while the rings are where they were */
    worker->memory = *memory;
    worker->memory_has_lost = guest_memory_has_lost(&worker->memory, NULL);
    for (uint32_t i = 0; i < WORKER_QUEUES; i++) {
        struct queue *queue = &worker->queues[i];
        if (!queue->started)
            continue;
        queue->absent = virtqueue_relocate(&queue->ring, &queue->layout, &worker->memory) < 0;
        activate(worker, queue);
    }
}

/* ---- the dirty log ---- */

void worker_set_log(struct worker *worker, const struct guest_region *log)
{
    worker->log.bits = log ? log->host : NULL;
    worker->log.nbytes = log ? log->nbytes : 0;
}

int worker_set_log_call(struct worker *worker, int fd)
{
    if (!may_signal(fd))
        return refuse_fd(fd);
    replace_fd(&worker->log.call_fd, fd);
    return 0;
}

void worker_log_buffers(struct worker *worker, int enabled)
{
    worker->log.buffers = enabled;
}

int worker_log_queue(struct worker *worker, uint32_t index, int enabled, uint64_t guest_address)
{
    if (index >= WORKER_QUEUES)
        return -EINVAL;
    worker->queues[index].logs = enabled;
    worker->queues[index].log_address = guest_address;
    return 0;
}

void queue_close(struct worker *worker, struct queue *queue)
{
    cancel_kick(worker, queue);
    replace_fd(&queue->kick_fd, -1);
    replace_fd(&queue->call_fd, -1);
    replace_fd(&queue->err_fd, -1);
    free(queue->requests);
    queue->requests = NULL;
    virtqueue_deinit(&queue->ring);
}
