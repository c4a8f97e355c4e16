/* Operations: transfers that are carried through until complete or failed. */
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

#include "ring/assertion.h"
#include "ring/at_once.h"
#include "ring/gather.h"
#include "ring/pieces.h"
#include "ring/share.h"
#include "ring/inside.h"

/* Python's are one who shares among the queues, each of which saw to it in time that there is one for its request. */
int operation_begin(struct worker *worker, struct request *request)
{
    uint32_t number = worker->free_operation;
    struct operation *operation = &worker->operations[number];

    if (!request && (worker->free_operations <= WORKER_TRANSFERS_MIN ||
                     !share_allows(worker->python_operations, worker->free_operations - WORKER_TRANSFERS_MIN)))
        return -EBUSY;
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

/* ---- encrypted data: what the guest wrote is encrypted in memory of our own, what it reads is decrypted in its own ---- */

static uint64_t cipher_sector(const struct operation *operation, uint64_t done)
{
    return (operation->host_offset + done - operation->cipher->origin) / EXTENT_SECTOR;
}

/* Decrypt all that was read, where it is. Sectors in several pieces go through a buffer. -> 0 or -errno */
static int decrypt(const struct operation *operation)
{
    const struct extent_cipher *cipher = operation->cipher;
    const struct iovec *data = operation->request->data;
    uint8_t scattered[EXTENT_SECTOR];
    uint64_t done = 0;
    int result = 0;

    while (done < operation->nbytes && result == 0) {
        struct piece_walk walk = pieces_walk(data, operation->piece.start + done, operation->nbytes - done);
        uint64_t run = 0, sector = cipher_sector(operation, done);
        struct iovec stretch;

        if (pieces_next(&walk, &stretch))
            run = stretch.iov_len - stretch.iov_len % EXTENT_SECTOR;
        if (run) {
            result = cipher->decrypt(cipher->context, sector, stretch.iov_base, stretch.iov_base, run);
        } else {
            run = EXTENT_SECTOR;
            pieces_load(data, operation->piece.start + done, run, scattered);
            result = cipher->decrypt(cipher->context, sector, scattered, scattered, run);
            pieces_store(data, operation->piece.start + done, run, scattered);
        }
        done += run;
    }
    return result;
}

static void free_bounce(struct worker *worker, struct operation *operation);

static void end(struct worker *worker, uint32_t number, int result)
{
    struct operation *operation = &worker->operations[number];
    struct request *request = operation->request;

    ASSERT(operation->verb > VERB_WAIT && worker->grace.in_flight[operation->epoch]);
    if (operation->copy)
        free_bounce(worker, operation);
    ASSERT(!operation->bounce && !operation->occupies);
    if (operation->cipher && operation->verb == VERB_READ && result == 0)
        result = decrypt(operation);
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

/* ---- O_DIRECT: a page is never written both by it and through the page cache ---- */

#define BOUNCE_NBYTES (256u << 10)    /* of one submission */
#define BOUNCE_ALL_NBYTES (16u << 20) /* of all that are under way */
#define BOUNCE_ALIGNMENT 4096u

_Static_assert(REQUEST_COPY_NBYTES <= BOUNCE_NBYTES, "a copy is bounced as a whole");

/* What is copied stays until all of it is written. */
static void drop_bounce(struct worker *worker, struct operation *operation)
{
    if (!operation->copy)
        free_bounce(worker, operation);
}

static void free_bounce(struct worker *worker, struct operation *operation)
{
    ASSERT(worker->bounce_nbytes >= operation->bounce_nbytes);
    worker->bounce_nbytes -= operation->bounce_nbytes;
    if (operation->bounce && worker->idle_bounces < IDLE_BOUNCES)
        worker->bounces[worker->idle_bounces++] = operation->bounce;
    else
        free(operation->bounce);
    operation->bounce = NULL;
    operation->bounce_nbytes = 0;
}

/* Memory for the front of what is to be written. -> 0; -EAGAIN: others have to end first; -ENOMEM. */
static int take_bounce(struct worker *worker, struct operation *operation, uint32_t nbytes)
{
    if (worker->bounce_nbytes && worker->bounce_nbytes + nbytes > BOUNCE_ALL_NBYTES)
        return -EAGAIN;
    if (worker->idle_bounces)
        operation->bounce = worker->bounces[--worker->idle_bounces];
    else if (posix_memalign((void **)&operation->bounce, BOUNCE_ALIGNMENT, BOUNCE_NBYTES))
        return -ENOMEM;
    operation->bounce_nbytes = nbytes;
    worker->bounce_nbytes += nbytes;
    return 0;
}

/* Let *gather be the front of what is left to write, encrypted. -> 0; as take_bounce, < 0; or how that failed. */
static int encrypt(struct worker *worker, struct operation *operation, struct iovec *single, struct gather *gather)
{
    const struct extent_cipher *cipher = operation->cipher;
    uint64_t left = operation->nbytes - operation->progress;
    uint32_t nbytes = left < BOUNCE_NBYTES ? left : BOUNCE_NBYTES;
    struct piece_walk walk = pieces_walk(operation->request->data, operation->piece.start + operation->progress, nbytes);
    const uint8_t *from;
    struct iovec whole;
    int result = take_bounce(worker, operation, nbytes);

    if (result < 0)
        return result;
    from = operation->bounce;
    if (pieces_next(&walk, &whole) && whole.iov_len == nbytes)
        from = whole.iov_base; /* in one piece it need not be copied */
    else
        pieces_load(operation->request->data, operation->piece.start + operation->progress, nbytes, operation->bounce);
    result = cipher->encrypt(cipher->context, cipher_sector(operation, operation->progress), from, operation->bounce,
                             nbytes);
    if (result < 0)
        free_bounce(worker, operation);
    *single = (struct iovec){operation->bounce, nbytes};
    *gather = (struct gather){.iovecs = single, .count = 1, .limit = 1, .nbytes = nbytes};
    return result;
}

/* Let *gather be what is left to move of a copy, which is in memory of ours as a whole. -> 0 or, as take_bounce, < 0. */
static int gather_copy(struct worker *worker, struct operation *operation, struct iovec *single,
                       struct gather *gather)
{
    int result = operation->bounce ? 0 : take_bounce(worker, operation, operation->nbytes);

    if (result < 0)
        return result;
    *single = (struct iovec){operation->bounce + operation->progress, operation->nbytes - operation->progress};
    *gather = (struct gather){.iovecs = single, .count = 1, .limit = 1, .nbytes = single->iov_len};
    return 0;
}

/* It has nothing to read. */
static bool copies_zeros(const struct operation *operation)
{
    return operation->copy && operation->verb == VERB_READ && operation->copy->old_slot == EXTENT_NO_SLOT;
}

/* What the next submission moves. -> 0 or, as gather_submission and encrypt, < 0. */
static int gather_transfer(struct worker *worker, struct operation *operation, struct iovec *single,
                           struct gather *gather)
{
    if (operation->copy)
        return gather_copy(worker, operation, single, gather);
    if (operation->cipher && operation->verb == VERB_WRITE)
        return encrypt(worker, operation, single, gather);
    return gather_submission(worker, operation, single, gather);
}

/* Let *gather be a copy of its front that O_DIRECT takes. -> 0 or, as take_bounce, < 0. */
static int bounce(struct worker *worker, struct operation *operation, struct iovec *single, struct gather *gather)
{
    uint32_t nbytes = gather->nbytes < BOUNCE_NBYTES ? gather->nbytes : BOUNCE_NBYTES, done = 0;
    int result = take_bounce(worker, operation, nbytes);

    if (result < 0)
        return result;
    for (uint32_t i = 0; done < nbytes; i++) {
        uint64_t run = gather->iovecs[i].iov_len;
        if (run > nbytes - done)
            run = nbytes - done;
        memcpy(operation->bounce + done, gather->iovecs[i].iov_base, run);
        done += run;
    }
    *single = (struct iovec){operation->bounce, nbytes};
    *gather = (struct gather){.iovecs = single, .count = 1, .limit = 1, .nbytes = nbytes};
    return 0;
}

/* Say whether the operation goes by O_DIRECT, and let *gather suit that. A read that does not suit it reads the page
 * cache, where nothing is that the disk has not. -> 0 or, as bounce, < 0. */
static int choose_way(struct worker *worker, struct operation *operation, struct iovec *single, struct gather *gather)
{
    const struct file *file = &worker->files[operation->slot];
    uint64_t host_offset = operation->host_offset + operation->progress;

    operation->direct = operation->data && file->direct_fd >= 0 && gather_is_aligned(gather, file, host_offset);
    if (operation->direct || operation->bounce || !operation->data || file->direct_fd < 0 || operation->verb != VERB_WRITE ||
        (host_offset | gather->nbytes) & (file->offset_align - 1))
        return 0;
    operation->direct = true;
    return bounce(worker, operation, single, gather);
}

enum { SUBMITTED = 0, MOVED = 1, WAITS = 2 };

/* -> SUBMITTED; MOVED: it has completed; WAITS: for its turn; -EAGAIN: the kernel takes nothing now, or the operation's own failure. */
static int submit_transfer(struct worker *worker, uint32_t number)
{
    struct operation *operation = &worker->operations[number];
    struct file *file = &worker->files[operation->slot];
    struct iovec single;
    struct gather gather;
    struct io_uring_sqe *entry;
    int result = gather_transfer(worker, operation, &single, &gather);

    if (result == 0 && copies_zeros(operation)) {
        memset(operation->bounce, 0, operation->nbytes);
        finish(worker, number);
        return MOVED;
    }
    if (result == 0)
        result = choose_way(worker, operation, &single, &gather);
    if (result < 0)
        return result;
    result = -EAGAIN;
    worker->now = pace_now(); /* what came before, zeros for a long read, say, is not this file's delay */
    if (!operation->direct && at_once_allows(file, gather.nbytes, worker->now))
        result = at_once_transfer(worker, operation, &gather);
    if (result != -EAGAIN) {
        drop_bounce(worker, operation);
        transfer_completed(worker, number, result);
        return MOVED;
    }
    entry = turn_is_now(worker, operation) ? uring_entry(&worker->uring) : NULL;
    if (!entry) {
        drop_bounce(worker, operation);
        return turn_is_now(worker, operation) ? -EAGAIN : WAITS;
    }
    prepare_transfer(entry, operation, file, &gather);
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
        result = gather_transfer(worker, operation, &single, &gather);
        if (result < 0)
            return result;
        prepare_transfer(&entry, operation, &worker->files[operation->slot], &gather);
        operation_trace_transfer(worker, operation, &gather);
    }
    result = host_perform(&entry);
    if (operation->verb == VERB_WRITE && !operation->direct && result > 0)
        worker->files[operation->slot].dirty += result;
    drop_bounce(worker, operation);
    if (worker->trace && operation->trace_id)
        trace_done(worker->trace, operation->trace_id, result);
    return result;
}

static void submit(struct worker *worker, uint32_t number);

/* The old bytes are in memory of ours: put the request's among them, and write all. */
static void write_copy(struct worker *worker, uint32_t number)
{
    struct operation *operation = &worker->operations[number];
    const struct request_copy *copy = operation->copy;
    const struct extent_cipher *old_cipher = copy->old_cipher, *cipher = copy->cipher;
    int result = 0;

    if (old_cipher && copy->old_slot != EXTENT_NO_SLOT)
        result = old_cipher->decrypt(old_cipher->context, (copy->old_offset - old_cipher->origin) / EXTENT_SECTOR,
                                     operation->bounce, operation->bounce, copy->nbytes);
    pieces_load(operation->request->data, operation->piece.start, operation->piece.nbytes,
                operation->bounce + copy->ahead);
    if (result == 0 && cipher)
        result = cipher->encrypt(cipher->context, (copy->host_offset - cipher->origin) / EXTENT_SECTOR,
                                 operation->bounce, operation->bounce, copy->nbytes);
    operation->verb = VERB_WRITE;
    operation->slot = copy->slot;
    operation->host_offset = copy->host_offset;
    operation->progress = 0;
    operation->data = true;
    if (result < 0)
        end(worker, number, result);
    else
        submit(worker, number);
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

/* Hand it to the kernel, for the first time or to go on. */
static void submit(struct worker *worker, uint32_t number)
{
    struct operation *operation = &worker->operations[number];
    bool is_transfer = operation->verb == VERB_READ || operation->verb == VERB_WRITE;
    int result;

    if (operation->verb != VERB_READ && worker->files[operation->slot].error) {
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
        submit(worker, number);
        number = next;
    }
}

void operations_advance(struct worker *worker)
{
    uint32_t number;

    while ((number = turn_next(worker)) != WORKER_OPERATIONS)
        submit(worker, number);
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
    submit(worker, number);
}

static void begin_piece(struct worker *worker, uint32_t number, uint32_t flags, uint32_t slot, uint64_t host_offset,
                        struct piece piece)
{
    struct operation *operation = &worker->operations[number];

    operation->piece = piece;
    operation->pieces = &operation->piece;
    operation->piece_count = 1;
    operation->data = flags & TRANSFER_DATA;
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
    submit(worker, number);
}

static void zero_completed(struct worker *worker, uint32_t number, int result)
{
    struct operation *operation = &worker->operations[number];
    bool cannot = result == -EOPNOTSUPP || result == -ENOSYS || result == -EINVAL || result == -ENODEV;

    if (!cannot) {
        end(worker, number, result);
    } else if (operation->verb == VERB_PUNCH) {
        operation->verb = VERB_ZERO_RANGE;
        submit(worker, number);
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
        submit(worker, number);
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
        operation->progress += result;
        ASSERT(operation->progress <= operation->nbytes);
        submit(worker, number);
    }
}

void operation_completed(struct worker *worker, uint32_t number, int result)
{
    struct operation *operation = &worker->operations[number];

    ASSERT(worker->submitted && operation->verb > VERB_WAIT);
    worker->submitted--;
    turn_end(worker, operation);
    drop_bounce(worker, operation);
    if (operation->verb == VERB_WRITE && !operation->direct && result > 0)
        worker->files[operation->slot].dirty += result; /* again: an fdatasync may have started meanwhile */
    if (worker->trace && operation->trace_id)
        trace_done(worker->trace, operation->trace_id, result);
    if (result == -ECANCELED && worker->files[operation->slot].storage != STORAGE_FAR)
        result = perform_here(worker, number);
    if (result == -ECANCELED && operation->verb == VERB_WRITE && operation->progress)
        result = -EIO; /* cancelled means untried to whoever asked, and a part of it is written */
    if (result == -EINTR || result == -EAGAIN)
        submit(worker, number);
    else if (operation->verb == VERB_READ || operation->verb == VERB_WRITE)
        transfer_completed(worker, number, result);
    else
        zero_completed(worker, number, result);
    operations_advance(worker);
}
