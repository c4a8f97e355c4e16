/* Operations: how they begin. ring/transfer.c carries them on. */
#include <errno.h>
#include <stddef.h>

#include "ring/assertion.h"
#include "ring/at_once.h"
#include "ring/inside.h"
#include "ring/share.h"

/* Python's are one who shares among the queues, each of which saw to it in time that there is one for its request. */
static bool has_room_for_python(const struct worker *worker)
{
    return worker->free_operations > WORKER_ASIDE &&
           share_allows(worker->python_operations, worker->free_operations - WORKER_ASIDE);
}

void operations_tell_room(struct worker *worker)
{
    if (!worker->refused_python || !has_room_for_python(worker))
        return;
    worker->refused_python = false;
    worker_tell(worker, (struct worker_event){.kind = EVENT_ROOM});
}

int operation_begin(struct worker *worker, struct request *request)
{
    uint32_t number = worker->free_operation;
    struct operation *operation = &worker->operations[number];

    if (!request && !has_room_for_python(worker)) {
        worker->refused_python = true;
        return -EBUSY;
    }
    ASSERT(worker->free_operations && operation->verb == VERB_FREE);
    worker->free_operation = operation->next;
    worker->free_operations--;
    if (request)
        request->queue->operations++;
    else
        worker->python_operations++;
    *operation = (struct operation){.verb = VERB_WAIT, .waiter.operation = number, .request = request};
    return number;
}

void operation_free(struct worker *worker, uint32_t number)
{
    struct operation *operation = &worker->operations[number];

    ASSERT(operation->verb != VERB_FREE && worker->free_operations < WORKER_OPERATIONS);
    ASSERT(operation->request ? operation->request->queue->operations : worker->python_operations);
    if (operation->request)
        operation->request->queue->operations--;
    else
        worker->python_operations--;
    operation->verb = VERB_FREE;
    operation->next = worker->free_operation;
    worker->free_operation = number;
    worker->free_operations++;
}

void operation_note_latency(struct worker *worker, const struct operation *operation)
{
    struct worker_statistics *statistics = &worker->statistics;

    histogram_add(operation->data ? &statistics->data : &statistics->metadata, worker->now - operation->waiter.since);
}

static void begin(struct worker *worker, uint32_t number, enum verb verb, uint32_t slot, uint64_t host_offset,
                  uint64_t nbytes)
{
    struct operation *operation = &worker->operations[number];

    ASSERT(operation->verb == VERB_WAIT && slot < worker->file_count);
    operation->verb = verb;
    operation->slot = slot;
    operation->host_offset = host_offset;
    operation->nbytes = nbytes;
    operation->epoch = worker->grace.epoch;
    if (!operation->request)
        worker->now = pace_now(); /* Python took its time */
    operation->waiter.since = worker->now;
    worker->grace.in_flight[operation->epoch]++;
    operation_submit(worker, number);
}

static void begin_piece(struct worker *worker, uint32_t number, uint32_t flags, uint32_t slot, uint64_t host_offset,
                        struct piece piece)
{
    struct operation *operation = &worker->operations[number];

    operation->piece = piece;
    operation->pieces = &operation->piece;
    operation->piece_count = 1;
    operation->data = flags & TRANSFER_DATA;
    operation->despite = flags & TRANSFER_DESPITE;
    begin(worker, number, flags & TRANSFER_WRITE ? VERB_WRITE : VERB_READ, slot, host_offset, piece.nbytes);
}

void request_transfer(struct worker *worker, struct request *request, bool is_write, const struct extent *extent,
                      uint64_t start)
{
    uint32_t number = operation_begin(worker, request);
    uint32_t flags = TRANSFER_DATA | (is_write ? TRANSFER_WRITE : TRANSFER_READ);

    request->parts++;
    worker->operations[number].cipher = extent->cipher;
    begin_piece(worker, number, flags, extent->slot, extent->host_offset,
                (struct piece){request_id(request), start, extent->nbytes});
}

void request_write_entry(struct worker *worker, struct request *request, uint32_t slot, uint64_t host_offset,
                         const void *bytes, uint32_t nbytes)
{
    uint32_t number = operation_begin(worker, request);

    request->parts++;
    begin_piece(worker, number, TRANSFER_WRITE, slot, host_offset, (struct piece){PIECE_HOST, (uintptr_t)bytes, nbytes});
}

void request_copy(struct worker *worker, struct request *request, const struct request_copy *copy, uint64_t start,
                  uint64_t nbytes)
{
    uint32_t number = operation_begin(worker, request);
    struct operation *operation = &worker->operations[number];

    ASSERT(copy->nbytes && copy->nbytes <= REQUEST_COPY_NBYTES && copy->ahead + nbytes <= copy->nbytes);
    request->parts++;
    operation->copy = copy;
    operation->piece = (struct piece){request_id(request), start, nbytes};
    operation->data = true;
    begin(worker, number, VERB_READ, copy->old_slot == EXTENT_NO_SLOT ? copy->slot : copy->old_slot, copy->old_offset,
          copy->nbytes);
}

/* -> 0 if the piece is inside what it names. */
int operation_check_piece(struct worker *worker, const struct piece *piece)
{
    const struct request *request;

    if (piece->source == PIECE_HOST)
        return 0;
    request = worker_request(worker, piece->source);
    if (!request || request->state != REQUEST_IN_PYTHON)
        return -ESTALE;
    if (piece->start > request->nbytes || piece->nbytes > request->nbytes - piece->start || !request->data)
        return -EINVAL;
    return 0;
}

int worker_transfer(struct worker *worker, uint32_t flags, uint32_t slot, uint64_t host_offset, uint64_t source,
                    uint64_t start, uint64_t nbytes)
{
    struct piece piece = {source, start, nbytes};
    int number = worker_has_slot(worker, slot) ? operation_check_piece(worker, &piece) : -EBADF;

    if (number == 0)
        number = operation_begin(worker, NULL);
    if (number >= 0)
        begin_piece(worker, number, flags, slot, host_offset, piece);
    return number;
}

int worker_transfer_pieces(struct worker *worker, uint32_t flags, uint32_t slot, uint64_t host_offset,
                           const struct piece *pieces, uint32_t count)
{
    uint64_t nbytes = 0;
    int number = worker_has_slot(worker, slot) ? 0 : -EBADF;

    for (uint32_t i = 0; i < count && number == 0; nbytes += pieces[i++].nbytes)
        number = operation_check_piece(worker, &pieces[i]);
    if (number == 0)
        number = operation_begin(worker, NULL);
    if (number < 0)
        return number;
    worker->operations[number].pieces = pieces;
    worker->operations[number].piece_count = count;
    worker->operations[number].data = flags & TRANSFER_DATA;
    begin(worker, number, flags & TRANSFER_WRITE ? VERB_WRITE : VERB_READ, slot, host_offset, nbytes);
    return number;
}

int worker_zero(struct worker *worker, uint32_t slot, uint64_t host_offset, uint64_t nbytes)
{
    int number = worker_has_slot(worker, slot) ? operation_begin(worker, NULL) : -EBADF;

    if (number >= 0)
        begin(worker, number, VERB_PUNCH, slot, host_offset, nbytes);
    return number;
}
