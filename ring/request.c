/* Requests: one chain in flight each, in the device's hands or in Python's. */
#include <errno.h>
#include <stddef.h>
#include <string.h>

#include "ring/assertion.h"
#include "ring/pieces.h"
#include "ring/inside.h"

static void count_lone(struct worker *worker, uint16_t queue)
{
    worker->lone_count = queue == worker->lone_queue ? worker->lone_count + 1 : 0;
    worker->lone_queue = queue;
}

void request_begin(struct worker *worker, struct queue *queue, const struct chain *chain)
{
    struct request *request = &queue->requests[chain->head];
    uint32_t count = chain->readable_count + chain->writable_count;

    ASSERT(request->state == REQUEST_FREE && queue->started && (count <= INLINE_PIECES || worker->free_long));
    request->waiter.request = request;
    request->queue = queue;
    request->head = chain->head;
    request->state = REQUEST_BUSY;
    request->begun_at = worker->now;
    request->generation = ++worker->generation;
    request->pieces = request->inline_pieces;
    if (count > INLINE_PIECES) {
        request->pieces = worker->long_free[--worker->free_long];
        queue->long_requests++;
    }
    memcpy(request->pieces, chain->pieces, count * sizeof(*chain->pieces));
    request->readable_count = chain->readable_count;
    request->writable_count = chain->writable_count;
    request->readable_nbytes = chain->readable_nbytes;
    request->writable_nbytes = chain->writable_nbytes;
    request->data = NULL;
    request->status = NULL;
    request->type = request->flags = 0;
    request->offset = request->nbytes = 0;
    request->parts = 0;
    request->error = 0;
    request->synced = false;
    request->then = 0;
    request->flight = 0;
    line_init(&request->followers);
    request->traced = false;
    queue->in_flight++;
    worker->requests_in_flight++;
    queue->busy_nbytes += chain->readable_nbytes + chain->writable_nbytes;
    worker->busy_nbytes += chain->readable_nbytes + chain->writable_nbytes;
    worker->counters->requests++;
    count_lone(worker, queue->index);
    worker->device->begin(worker->device, worker, request);
    queue_has_lost(worker, queue);
}

static void log_bytes(struct worker *worker, const void *host, uint64_t nbytes)
{
    uint64_t guest_address;

    if (guest_memory_locate(&worker->memory, host, &guest_address))
        dirty_log_mark(&worker->log, guest_address, nbytes);
}

/* Log all that may have been written: a transfer that failed may have filled a part of its data. */
static void log_buffers(struct worker *worker, const struct request *request)
{
    bool is_filled = request->data && request->data >= request->pieces + request->readable_count;
    struct piece_walk walk = pieces_walk(request->data, 0, is_filled ? request->nbytes : 0);
    struct iovec stretch;

    while (pieces_next(&walk, &stretch))
        log_bytes(worker, stretch.iov_base, stretch.iov_len);
    if (request->status)
        log_bytes(worker, request->status, 1);
}

void request_complete(struct worker *worker, struct request *request, uint32_t nbytes)
{
    struct queue *queue = request->queue;

    if (worker->log.bits && worker->log.buffers)
        log_buffers(worker, request);
    if (request->pieces != request->inline_pieces) {
        ASSERT(worker->free_long < LONG_PIECES && queue->long_requests);
        worker->long_free[worker->free_long++] = request->pieces;
        queue->long_requests--;
    }
    ASSERT(request->state != REQUEST_FREE && !request->parts && queue->in_flight && worker->requests_in_flight);
    ASSERT(!request->followers.first && queue->busy_nbytes >= request->readable_nbytes + request->writable_nbytes);
    request->state = REQUEST_FREE;
    if (request->awaited && --worker->awaited == 0)
        worker_tell(worker, (struct worker_event){.kind = EVENT_IDLE});
    request->awaited = false;
    queue->in_flight--;
    worker->statistics.queues[queue->index].requests++;
    histogram_add(&worker->statistics.queues[queue->index].service,
                  worker->now - request->begun_at);
    worker->requests_in_flight--;
    queue->busy_nbytes -= request->readable_nbytes + request->writable_nbytes;
    worker->returned_nbytes += request->readable_nbytes + request->writable_nbytes;
    virtqueue_push(&queue->ring, request->head, nbytes);
    queue_show(worker, queue);
}

struct request *worker_request(struct worker *worker, uint64_t id)
{
    struct queue *queue = &worker->queues[id >> 16 & 0xff];
    struct request *request;

    if (!queue->requests || (id & 0xffff) >= queue->layout.size)
        return NULL;
    request = &queue->requests[id & 0xffff];
    return request->state != REQUEST_FREE && request->generation == id >> 32 ? request : NULL;
}

void request_park(struct worker *worker, struct request *request)
{
    ASSERT(request->state == REQUEST_BUSY && !request->parts && worker->requests_in_flight);
    worker->requests_in_flight--;
}

void request_take_up(struct worker *worker, struct request *request)
{
    ASSERT(request->state == REQUEST_BUSY && !request->parts);
    worker->requests_in_flight++;
}

void request_hold(struct request *request)
{
    request->parts++;
}

void request_release(struct worker *worker, struct request *request, int result)
{
    ASSERT(request->parts && request->state != REQUEST_FREE);
    if (result < 0 && request->error == 0)
        request->error = result;
    if (--request->parts == 0)
        worker->device->end(worker->device, worker, request, request->error);
}

void request_trace(struct worker *worker, struct request *request, uint32_t flags)
{
    struct trace_record record = {
        .kind = TRACE_REQUEST,
        .id = request_id(request),
        .offset = request->offset,
        .nbytes = request->nbytes,
        .type = request->type,
        .flags = flags,
    };
    uint32_t count = request->data ? request->readable_count - (request->data - request->pieces) : 0;

    request->traced = true;
    trace_add(worker->trace, record, request->data, count);
}

void request_trace_answer(struct worker *worker, const struct request *request, int status)
{
    struct trace_record record = {
        .kind = TRACE_ANSWER,
        .result = status,
        .id = request_id(request),
        .type = request->type,
    };

    trace_add(worker->trace, record, NULL, 0);
}

void request_punt(struct worker *worker, struct request *request, uint32_t type)
{
    ASSERT(request->state == REQUEST_BUSY && !request->parts);
    request->state = REQUEST_IN_PYTHON;
    worker->counters->python_requests++;
    worker_tell(worker, (struct worker_event){
                            .kind = EVENT_REQUEST,
                            .id = request_id(request),
                            .type = type,
                            .flags = request->flags,
                            .offset = request->offset,
                            .nbytes = request->nbytes,
                        });
}

/* -> 0 if [start, start + nbytes) of the request's data is Python's to touch. */
static int find_data(struct worker *worker, uint64_t id, uint64_t start, uint64_t nbytes, struct request **request)
{
    *request = worker_request(worker, id);
    if (!*request || (*request)->state != REQUEST_IN_PYTHON)
        return -ESTALE;
    if (start > (*request)->nbytes || nbytes > (*request)->nbytes - start || !(*request)->data)
        return -EINVAL;
    return 0;
}

int worker_finish(struct worker *worker, uint64_t id, uint32_t status)
{
    struct request *request = worker_request(worker, id);

    if (!request || request->state != REQUEST_IN_PYTHON)
        return -ESTALE;
    request->state = REQUEST_BUSY;
    worker->now = pace_now();
    worker->device->end(worker->device, worker, request, status);
    return 0;
}

bool pieces_have_lost(struct worker *worker, const struct iovec *pieces, uint64_t start, uint64_t nbytes)
{
    uint32_t losses = loss_count();
    struct piece_walk walk;
    struct iovec stretch;

    if (losses != worker->losses_judged) {
        worker->losses_judged = losses;
        worker->memory_has_lost = guest_memory_has_lost(&worker->memory, NULL);
    }
    if (!worker->memory_has_lost)
        return false;
    walk = pieces_walk(pieces, start, nbytes);
    while (pieces_next(&walk, &stretch))
        if (guest_memory_has_lost(&worker->memory, stretch.iov_base))
            return true;
    return false;
}

int worker_load(struct worker *worker, uint64_t id, uint64_t start, void *to, uint64_t nbytes)
{
    struct request *request;
    int result = find_data(worker, id, start, nbytes, &request);

    if (result < 0)
        return result;
    pieces_load(request->data, start, nbytes, to);
    queue_has_lost(worker, request->queue);
    return pieces_have_lost(worker, request->data, start, nbytes) ? -EFAULT : 0;
}

int worker_store(struct worker *worker, uint64_t id, uint64_t start, const void *from, uint64_t nbytes)
{
    struct request *request;
    int result = find_data(worker, id, start, nbytes, &request);

    if (result < 0)
        return result;
    pieces_store(request->data, start, nbytes, from);
    return queue_has_lost(worker, request->queue) ? -EFAULT : 0;
}

int worker_clear(struct worker *worker, uint64_t id, uint64_t start, uint64_t nbytes)
{
    struct request *request;
    int result = find_data(worker, id, start, nbytes, &request);

    if (result < 0)
        return result;
    pieces_clear(request->data, start, nbytes);
    return queue_has_lost(worker, request->queue) ? -EFAULT : 0;
}
