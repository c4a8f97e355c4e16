/* Transfers and zeroing, carried on until complete or failed. ring/operation.c begins them. */
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stddef.h>
#include <string.h>
#include <sys/uio.h>

#include "ring/assertion.h"
#include "ring/at_once.h"
#include "ring/bounce.h"
#include "ring/inside.h"

static void end(struct worker *worker, uint32_t number, int result)
{
    struct operation *operation = &worker->operations[number];
    struct request *request = operation->request;

    ASSERT(operation->verb > VERB_WAIT && worker->grace.in_flight[operation->epoch]);
    if (operation->copy)
        bounce_free(worker, operation);
    ASSERT(!operation->bounce && !operation->occupies);
    if (operation->cipher && operation->verb == VERB_READ && result == 0)
        result = bounce_decrypt(operation);
    worker->grace.in_flight[operation->epoch]--;
    worker->progress = true;
    operation_note_latency(worker, operation);
    if (!request) {
        worker_tell(worker, (struct worker_event){.kind = EVENT_DONE, .result = result, .id = number});
        return;
    }
    operation_free(worker, number);
    request_release(worker, request, result);
}

static void prepare_transfer(struct io_uring_sqe *entry, const struct operation *operation, const struct file *file,
                             const struct gather *gather)
{
    uint64_t host_offset = operation->host_offset + operation->progress;
    const struct iovec *iovecs = gather->iovecs;
    int fd = operation->direct ? file->direct_fd : file->fd;

    if (operation->verb == VERB_READ && gather->count == 1)
        io_uring_prep_read(entry, fd, iovecs->iov_base, iovecs->iov_len, host_offset);
    else if (operation->verb == VERB_READ)
        io_uring_prep_readv(entry, fd, iovecs, gather->count, host_offset);
    else if (gather->count == 1)
        io_uring_prep_write(entry, fd, iovecs->iov_base, iovecs->iov_len, host_offset);
    else
        io_uring_prep_writev(entry, fd, iovecs, gather->count, host_offset);
    if (file->storage == STORAGE_FAR)
        entry->flags |= IOSQE_ASYNC; /* or the kernel tries on this thread, and FUSE does not know of not waiting */
}

void operation_trace_transfer(struct worker *worker, struct operation *operation, const struct gather *gather)
{
    if (worker->trace && operation->verb == VERB_WRITE)
        operation->trace_id = trace_write(worker->trace, operation->slot, operation->host_offset + operation->progress,
                                          gather->iovecs, gather->count);
}

static void transfer_completed(struct worker *worker, uint32_t number, int result);
static void finish(struct worker *worker, uint32_t number);

/* It has nothing to read. */
static bool copies_zeros(const struct operation *operation)
{
    return operation->copy && operation->verb == VERB_READ && operation->copy->old_slot == EXTENT_NO_SLOT;
}

/* What the next submission moves. -> 0 or, as gather_submission and bounce_gather, < 0. */
static int gather_next(struct worker *worker, struct operation *operation, struct iovec *single, struct gather *gather)
{
    return bounces(operation) ? bounce_gather(worker, operation, single, gather)
                              : gather_submission(worker, operation, single, gather);
}

/* Say whether the operation goes by O_DIRECT, and let *gather suit that: no page is written both by it and through the
 * page cache. A read that does not suit it reads the page cache, where nothing is that the disk has not.
 * -> 0 or, as bounce_front, < 0. */
static int choose_way(struct worker *worker, struct operation *operation, struct iovec *single, struct gather *gather)
{
    const struct file *file = &worker->files[operation->slot];
    uint64_t host_offset = operation->host_offset + operation->progress;

    operation->direct = operation->data && file->direct_fd >= 0 && gather_is_aligned(gather, file, host_offset);
    if (operation->direct || operation->bounce || !operation->data || file->direct_fd < 0 || operation->verb != VERB_WRITE ||
        (host_offset | gather->nbytes) & (file->offset_align - 1))
        return 0;
    operation->direct = true;
    return bounce_front(worker, operation, single, gather);
}

/* What the next submission moves, and which way. -> 0; as those two; -EFAULT: the guest's memory is gone. */
static int gather_way(struct worker *worker, struct operation *operation, struct iovec *single, struct gather *gather)
{
    int result = gather_next(worker, operation, single, gather);

    if (result == 0)
        result = choose_way(worker, operation, single, gather);
    if (result == 0 && gather_has_lost(worker, operation)) {
        bounce_drop(worker, operation);
        result = -EFAULT;
    }
    return result;
}

#define ASIDE_NBYTES (4u << 20)

/* To copy much out of the page cache takes a processor's time. While more is under way each second long read is
 * another thread's, so that two copy at once; and whatever is so long that others would wait for it is. */
static bool goes_aside(struct worker *worker, const struct operation *operation, uint64_t nbytes)
{
    if (operation->direct || nbytes > ASIDE_NBYTES)
        return !operation->direct;
    if (operation->verb != VERB_READ || nbytes <= PACE_NBYTES || worker->requests_in_flight < 2)
        return false;
    worker->goes_aside = !worker->goes_aside;
    return worker->goes_aside;
}

#define REFUSALS_MAX 100 /* in a row */

enum { SUBMITTED = 0, MOVED = 1, WAITS = 2 };

/* -> SUBMITTED; MOVED: it has completed; WAITS: for its turn; -EAGAIN: the kernel takes nothing now, or the operation's own failure. */
static int submit_transfer(struct worker *worker, uint32_t number)
{
    struct operation *operation = &worker->operations[number];
    struct file *file = &worker->files[operation->slot];
    struct iovec single;
    struct gather gather;
    struct io_uring_sqe *entry;
    int result = gather_way(worker, operation, &single, &gather);

    if (result == 0 && copies_zeros(operation)) {
        memset(operation->bounce, 0, operation->nbytes);
        finish(worker, number);
        return MOVED;
    }
    if (result < 0)
        return result;
    result = -EAGAIN;
    worker->now = pace_now(); /* what came before, zeros for a long read, say, is not this file's delay */
    if (!operation->direct && at_once_allows(file, gather.nbytes, worker->now))
        result = at_once_transfer(worker, operation, &gather);
    if (result != -EAGAIN) {
        bounce_drop(worker, operation);
        transfer_completed(worker, number, result);
        return MOVED;
    }
    entry = turn_is_now(worker, operation) ? uring_entry(&worker->uring) : NULL;
    if (!entry) {
        bounce_drop(worker, operation);
        return turn_is_now(worker, operation) ? -EAGAIN : WAITS;
    }
    prepare_transfer(entry, operation, file, &gather);
    if (goes_aside(worker, operation, gather.nbytes))
        entry->flags |= IOSQE_ASYNC;
    if (operation->verb == VERB_WRITE && !operation->direct)
        file->dirty += gather.nbytes;
    operation_trace_transfer(worker, operation, &gather);
    io_uring_sqe_set_data64(entry, tagged(TAG_OPERATION, number, 0));
    return SUBMITTED;
}

static void prepare_zero(struct worker *worker, struct operation *operation, struct io_uring_sqe *entry)
{
    int how = operation->verb == VERB_PUNCH ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE;

    io_uring_prep_fallocate(entry, worker->files[operation->slot].fd, how | FALLOC_FL_KEEP_SIZE,
                            operation->host_offset, operation->nbytes);
    if (worker->trace)
        operation->trace_id = trace_zero(worker->trace, operation->slot, operation->host_offset, operation->nbytes);
}

static int submit_zero(struct worker *worker, uint32_t number)
{
    struct io_uring_sqe *entry;

    if (!turn_is_now(worker, &worker->operations[number]))
        return WAITS;
    entry = uring_entry(&worker->uring);
    if (!entry)
        return -EAGAIN;
    prepare_zero(worker, &worker->operations[number], entry);
    io_uring_sqe_set_data64(entry, tagged(TAG_OPERATION, number, 0));
    return 0;
}

/* The kernel could make no thread for it (a limit of processes) and cancelled it untried: this thread does it, late
 * rather than not at all, but where it could hang. -> the completion's result */
static int perform_here(struct worker *worker, uint32_t number)
{
    struct operation *operation = &worker->operations[number];
    struct io_uring_sqe entry = {0};
    struct iovec single;
    struct gather gather;
    int result;

    if (operation->verb != VERB_READ && operation->verb != VERB_WRITE) {
        prepare_zero(worker, operation, &entry);
    } else {
        result = gather_way(worker, operation, &single, &gather);
        if (result < 0)
            return result;
        prepare_transfer(&entry, operation, &worker->files[operation->slot], &gather);
        operation_trace_transfer(worker, operation, &gather);
    }
    result = host_perform(&entry);
    if (operation->verb == VERB_WRITE && !operation->direct && result > 0)
        worker->files[operation->slot].dirty += result;
    bounce_drop(worker, operation);
    if (worker->trace && operation->trace_id)
        trace_done(worker->trace, operation->trace_id, result);
    return result;
}

/* The old bytes are in memory of ours: put the request's among them, and write all. */
static void write_copy(struct worker *worker, uint32_t number)
{
    struct operation *operation = &worker->operations[number];
    const struct request_copy *copy = operation->copy;
    int result = bounce_merge(operation);

    if (result == 0 && pieces_have_lost(worker, operation->request->data, operation->piece.start, operation->piece.nbytes))
        result = -EFAULT;
    operation->verb = VERB_WRITE;
    operation->slot = copy->slot;
    operation->host_offset = copy->host_offset;
    operation->progress = 0;
    operation->data = true;
    if (result < 0)
        end(worker, number, result);
    else
        operation_submit(worker, number);
}

/* All of it was moved: that is its end, or a copy has been read. */
static void finish(struct worker *worker, uint32_t number)
{
    const struct operation *operation = &worker->operations[number];

    if (operation->copy && operation->verb == VERB_READ)
        write_copy(worker, number);
    else
        end(worker, number, 0);
}

void operation_submit(struct worker *worker, uint32_t number)
{
    struct operation *operation = &worker->operations[number];
    bool is_transfer = operation->verb == VERB_READ || operation->verb == VERB_WRITE;
    int result;

    if (operation->verb != VERB_READ && worker->files[operation->slot].error && !operation->despite) {
        end(worker, number, -EIO);
        return;
    }
    if (operation->progress == operation->nbytes) {
        finish(worker, number);
        return;
    }
    result = is_transfer ? submit_transfer(worker, number) : submit_zero(worker, number);
    if (result == MOVED)
        return;
    if (result == SUBMITTED) {
        worker->submitted++;
        turn_begin(worker, operation);
    } else if (result == WAITS) {
        turn_wait(worker, number);
    } else if (result == -EAGAIN) {
        operation->next = worker->stalled;
        worker->stalled = number;
    } else {
        end(worker, number, result);
    }
}

void operations_retry(struct worker *worker)
{
    uint32_t number = worker->stalled;

    worker->stalled = WORKER_OPERATIONS;
    while (number != WORKER_OPERATIONS) {
        uint32_t next = worker->operations[number].next;
        operation_submit(worker, number);
        number = next;
    }
}

void operations_advance(struct worker *worker)
{
    uint32_t number;

    while ((number = turn_next(worker)) != WORKER_OPERATIONS)
        operation_submit(worker, number);
}

/* Zeros are written where the host can do nothing better, up to the end of the file: past it they are there. */
static void write_zeros(struct worker *worker, uint32_t number)
{
    struct operation *operation = &worker->operations[number];
    uint64_t length, left;
    int result = host_length(worker->files[operation->slot].fd, &length);

    if (result < 0) {
        end(worker, number, result);
        return;
    }
    left = operation->host_offset < length ? length - operation->host_offset : 0;
    operation->nbytes = operation->nbytes < left ? operation->nbytes : left;
    operation->verb = VERB_WRITE;
    operation->piece = (struct piece){PIECE_ZEROS, 0, operation->nbytes};
    operation->pieces = &operation->piece;
    operation->piece_count = 1;
    operation_submit(worker, number);
}

static void zero_completed(struct worker *worker, uint32_t number, int result)
{
    struct operation *operation = &worker->operations[number];
    bool cannot = result == -EOPNOTSUPP || result == -ENOSYS || result == -EINVAL || result == -ENODEV;

    if (!cannot) {
        end(worker, number, result);
    } else if (operation->verb == VERB_PUNCH) {
        operation->verb = VERB_ZERO_RANGE;
        operation_submit(worker, number);
    } else {
        write_zeros(worker, number);
    }
}

static void transfer_completed(struct worker *worker, uint32_t number, int result)
{
    struct operation *operation = &worker->operations[number];

    if (operation->cipher && operation->verb == VERB_WRITE && result > 0)
        result -= result % EXTENT_SECTOR; /* the rest of a sector, encrypted anew, would not match its front */
    if (result == -EINVAL && operation->direct) {
        operation->data = false; /* the file system wants more alignment than it says */
        operation_submit(worker, number);
    } else if (result < 0) {
        end(worker, number, result);
    } else if (result == 0 && operation->verb == VERB_READ) {
        if (operation->copy)
            memset(operation->bounce + operation->progress, 0, operation->nbytes - operation->progress);
        else
            gather_zero_rest(worker, operation);
        finish(worker, number);
    } else if (result == 0) {
        end(worker, number, -EIO);
    } else {
        operation->refusals = 0;
        operation->progress += result;
        ASSERT(operation->progress <= operation->nbytes);
        operation_submit(worker, number);
    }
}

/* Who says "not now" is asked again, but not for ever: a file system may answer all sorts of things. -> the result */
static int note_refusal(struct operation *operation, int result)
{
    bool is_refused = result == -EINTR || result == -EAGAIN;

    return is_refused && ++operation->refusals > REFUSALS_MAX ? -EIO : result;
}

void operation_completed(struct worker *worker, uint32_t number, int result)
{
    struct operation *operation = &worker->operations[number];

    ASSERT(worker->submitted && operation->verb > VERB_WAIT);
    worker->submitted--;
    turn_end(worker, operation);
    bounce_drop(worker, operation);
    if (operation->verb == VERB_WRITE && !operation->direct && result > 0)
        worker->files[operation->slot].dirty += result; /* again: an fdatasync may have started meanwhile */
    if (worker->trace && operation->trace_id)
        trace_done(worker->trace, operation->trace_id, result);
    if (result == -ECANCELED && worker->files[operation->slot].storage != STORAGE_FAR)
        result = perform_here(worker, number);
    if (result == -ECANCELED && operation->verb == VERB_WRITE && operation->progress)
        result = -EIO; /* cancelled means untried to whoever asked, and a part of it is written */
    if (result > 0 && gather_has_lost(worker, operation))
        result = -EFAULT; /* meanwhile; and who knows whether the kernel met the page, or zeros in its place */
    result = note_refusal(operation, result);
    if (result == -EINTR || result == -EAGAIN)
        operation_submit(worker, number);
    else if (operation->verb == VERB_READ || operation->verb == VERB_WRITE)
        transfer_completed(worker, number, result);
    else
        zero_completed(worker, number, result);
    operations_advance(worker);
}
