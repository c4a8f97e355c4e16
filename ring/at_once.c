#include "ring/at_once.h"

#include <errno.h>
#include <string.h>
#include <sys/uio.h>

#include "ring/pieces.h"
#include "ring/window.h"
#include "ring/word.h"

#define STORES_DIRTY 4096u /* bytes; see write_cached */
#define COPY_PIECES 34 /* 64 KiB in pages, one of them split in two, and what is around */

bool at_once_allows(const struct file *file, uint64_t nbytes, uint64_t now)
{
    return storage_is_near(file->storage) && nbytes <= PACE_NBYTES && pace_allows(&file->pace, now);
}

static int64_t read_cached(struct file *file, const struct gather *gather, uint64_t host_offset, uint64_t now)
{
    int64_t result = window_read(file, gather, host_offset);

    if (result >= 0)
        return result;
    result = host_read_cached(file->fd, gather->iovecs, gather->count, host_offset, file->storage == STORAGE_MEMORY);
    if (result > 0)
        window_note(file, host_offset, result, now);
    return result;
}

/* After each sync the first store to a page faults, which costs more than a write: it has to pay. */
static int64_t write_cached(struct file *file, const struct operation *operation, const struct gather *gather,
                            uint64_t host_offset)
{
    bool is_word = gather->count == 1 && gather->nbytes == sizeof(uint64_t) && host_offset % sizeof(uint64_t) == 0;
    bool pays = file->dirty >= STORES_DIRTY;

    if (operation->stores && is_word && pays &&
        word_store(file, host_offset, gather->iovecs[0].iov_base, sizeof(uint64_t)))
        return sizeof(uint64_t);
    return host_write(file->fd, gather->iovecs, gather->count, host_offset);
}

/* Read what is in the page cache, or write to it, on this thread. -> bytes, or -errno; -EAGAIN: it would wait. */
int at_once_transfer(struct worker *worker, struct operation *operation, const struct gather *gather)
{
    struct file *file = &worker->files[operation->slot];
    uint64_t host_offset = operation->host_offset + operation->progress, began = worker->now;
    int64_t result;

    operation_trace_transfer(worker, operation, gather);
    if (operation->verb == VERB_READ)
        result = read_cached(file, gather, host_offset, began);
    else
        result = write_cached(file, operation, gather, host_offset);
    if (worker->trace && operation->trace_id)
        trace_done(worker->trace, operation->trace_id, result);
    if (result > 0 && operation->verb == VERB_WRITE)
        file->dirty += result;
    worker->counters->immediate += result >= 0;
    worker->counters->stalls += pace_note(&file->pace, began, worker->now = pace_now());
    window_ended(file, began, worker->now);
    return result;
}

/* Write all of it on this thread, whatever the pace. -> 0; -EAGAIN: no room to gather it now, nothing was written; or
 * how it failed, perhaps in the middle. */
static int write_now(struct worker *worker, struct operation *operation)
{
    operation->waiter.since = worker->now;
    while (operation->progress < operation->nbytes) {
        struct iovec single;
        struct gather gather;
        int result = gather_submission(worker, operation, &single, &gather);

        if (result < 0)
            return result == -EAGAIN && operation->progress ? -ENOMEM : result;
        if (gather_has_lost(worker, operation))
            return -EFAULT;
        result = at_once_transfer(worker, operation, &gather);
        if (result == 0 || result == -EAGAIN)
            return -EIO;
        if (result < 0)
            return result;
        operation->progress += result;
    }
    operation_note_latency(worker, operation);
    return 0;
}

/* -> 0; -EAGAIN: not now, nothing was written; or how it failed. */
static int write_at_once(struct worker *worker, struct operation *operation)
{
    const struct file *file = &worker->files[operation->slot];
    bool may_be_direct = operation->data && file->direct_fd >= 0;

    if (file->error)
        return -EIO;
    worker->now = pace_now();
    if (may_be_direct || !at_once_allows(file, operation->nbytes, worker->now))
        return -EAGAIN;
    return write_now(worker, operation);
}

int worker_write_at_once(struct worker *worker, uint32_t flags, uint32_t slot, uint64_t host_offset,
                         const struct piece *pieces, uint32_t count)
{
    struct operation operation = {.verb = VERB_WRITE, .slot = slot, .host_offset = host_offset, .pieces = pieces};
    int result = worker_has_slot(worker, slot) ? 0 : -EBADF;

    for (uint32_t i = 0; i < count && result == 0; operation.nbytes += pieces[i++].nbytes)
        result = operation_check_piece(worker, &pieces[i]);
    if (result < 0)
        return result;
    if (!worker->at_once)
        return -EAGAIN;
    worker->at_once--;
    operation.piece_count = count;
    operation.data = flags & TRANSFER_DATA;
    return write_at_once(worker, &operation);
}

int worker_write_some(struct worker *worker, uint32_t slot, uint32_t count, const uint64_t *host_offsets,
                      const uint32_t *nbytes, const uint8_t *bytes, uint32_t *done)
{
    int result = 0;

    for (*done = 0; *done < count && result == 0; *done += result == 0) {
        struct piece piece = {PIECE_HOST, (uintptr_t)bytes, nbytes[*done]};

        bytes += nbytes[*done];
        result = worker_write_at_once(worker, 0, slot, host_offsets[*done], &piece, 1);
    }
    return result;
}

static struct operation write_of(uint32_t slot, uint64_t host_offset, const struct piece *piece)
{
    return (struct operation){
        .verb = VERB_WRITE,
        .slot = slot,
        .host_offset = host_offset,
        .nbytes = piece->nbytes,
        .pieces = piece,
        .piece_count = 1,
    };
}

int request_write_at_once(struct worker *worker, struct request *request, uint32_t slot, uint64_t host_offset,
                          uint64_t start, uint64_t nbytes)
{
    struct piece piece = {request_id(request), start, nbytes};
    struct operation operation = write_of(slot, host_offset, &piece);

    operation.data = true;
    return worker_has_slot(worker, slot) ? write_at_once(worker, &operation) : -EAGAIN;
}

static int write_entry(struct worker *worker, uint32_t slot, uint64_t host_offset, const void *bytes, uint32_t nbytes,
                       bool stores)
{
    struct piece piece = {PIECE_HOST, (uintptr_t)bytes, nbytes};
    struct operation operation = write_of(slot, host_offset, &piece);

    operation.stores = stores;
    return worker->files[slot].error ? -EIO : write_now(worker, &operation);
}

int worker_write_entry(struct worker *worker, uint32_t slot, uint64_t host_offset, const void *bytes, uint32_t nbytes)
{
    return write_entry(worker, slot, host_offset, bytes, nbytes, false);
}

bool worker_allows_entry(struct worker *worker, uint32_t slot, uint32_t nbytes)
{
    return worker_has_slot(worker, slot) && at_once_allows(&worker->files[slot], nbytes, worker->now = pace_now());
}

/* Read as far as the file goes. -> bytes; -EAGAIN: not all of it is in the page cache, or it cannot be read. */
static int64_t read_now(struct worker *worker, struct operation *operation, uint8_t *to)
{
    operation->waiter.since = worker->now;
    while (operation->progress < operation->nbytes) {
        struct iovec rest = {to + operation->progress, operation->nbytes - operation->progress};
        struct gather gather = {.iovecs = &rest, .count = 1, .nbytes = rest.iov_len};
        int result = at_once_transfer(worker, operation, &gather);

        if (result < 0)
            return -EAGAIN;
        if (result == 0)
            break;
        operation->progress += result;
    }
    operation_note_latency(worker, operation);
    return operation->progress;
}

/* Read nbytes into the worker's buffer; past the end of the file are zeros. -> 0, or < 0: now it cannot. */
static int read_old(struct worker *worker, uint32_t slot, uint64_t host_offset, uint64_t nbytes)
{
    struct operation operation = {.verb = VERB_READ, .slot = slot, .host_offset = host_offset, .nbytes = nbytes};
    int64_t result;

    operation.data = true;
    result = read_now(worker, &operation, worker->old);
    if (result < 0)
        return result;
    memset(worker->old + result, 0, nbytes - result);
    return 0;
}

static int read_table(struct extent_reader *reader, uint32_t slot, uint64_t host_offset, void *to, uint32_t nbytes)
{
    struct table_reader *self = (struct table_reader *)reader;
    struct worker *worker = self->worker;
    struct operation operation = {.verb = VERB_READ, .slot = slot, .host_offset = host_offset, .nbytes = nbytes};

    if (!self->left || !worker_has_slot(worker, slot) ||
        !at_once_allows(&worker->files[slot], nbytes, worker->now = pace_now()))
        return -EAGAIN;
    self->left--;
    return read_now(worker, &operation, to) == nbytes ? 0 : -EAGAIN;
}

struct table_reader worker_table_reader(struct worker *worker)
{
    return (struct table_reader){.reader.read = read_table, .worker = worker, .left = WORKER_TABLES};
}

static int write_table(struct extent_writer *writer, uint32_t slot, uint64_t host_offset, const void *bytes,
                       uint32_t nbytes)
{
    struct worker *worker = ((struct table_writer *)writer)->worker;

    return worker_allows_entry(worker, slot, nbytes) ? write_entry(worker, slot, host_offset, bytes, nbytes, true)
                                                     : -EAGAIN;
}

struct table_writer worker_table_writer(struct worker *worker)
{
    return (struct table_writer){.writer.write = write_table, .worker = worker};
}

/* What is around the request's bytes in the worker's buffer, and they. -> false: they are in too many pieces. */
static bool gather_copy(struct worker *worker, const struct request *request, const struct request_copy *copy,
                        uint64_t start, uint64_t nbytes, struct gather *gather)
{
    struct piece_walk walk = pieces_walk(request->data, start, nbytes);
    uint64_t behind = copy->ahead + nbytes;

    if (copy->ahead)
        gather->iovecs[gather->count++] = (struct iovec){worker->old, copy->ahead};
    while (pieces_next(&walk, &gather->iovecs[gather->count]))
        if (++gather->count == gather->limit - 1)
            return false;
    if (behind < copy->nbytes)
        gather->iovecs[gather->count++] = (struct iovec){worker->old + behind, copy->nbytes - behind};
    gather->nbytes = copy->nbytes;
    return true;
}

static int sectors_of(const struct extent_cipher *cipher, uint64_t host_offset, uint64_t nbytes, uint64_t *first)
{
    *first = (host_offset - cipher->origin) / EXTENT_SECTOR;
    return (host_offset - cipher->origin) % EXTENT_SECTOR || nbytes % EXTENT_SECTOR ? -EAGAIN : 0;
}

/* Let what is elsewhere be in the worker's buffer. -> 0, or < 0: now it cannot. */
static int load_old(struct worker *worker, const struct request_copy *copy)
{
    const struct extent_cipher *cipher = copy->old_cipher;
    uint64_t sector;
    int result;

    if (copy->old_slot == EXTENT_NO_SLOT) {
        memset(worker->old, 0, copy->nbytes);
        return 0;
    }
    if (!at_once_allows(&worker->files[copy->old_slot], copy->nbytes, worker->now))
        return -EAGAIN;
    result = read_old(worker, copy->old_slot, copy->old_offset, copy->nbytes);
    if (result == 0 && cipher)
        result = sectors_of(cipher, copy->old_offset, copy->nbytes, &sector);
    if (result == 0 && cipher)
        result = cipher->decrypt(cipher->context, sector, worker->old, worker->old, copy->nbytes);
    return result;
}

/* Let *gather be the whole stretch, encrypted in the worker's buffer. -> 0, or < 0: now it cannot. */
static int encrypt_copy(struct worker *worker, const struct request *request, const struct request_copy *copy,
                        uint64_t start, uint64_t nbytes, struct gather *gather)
{
    const struct extent_cipher *cipher = copy->cipher;
    uint64_t sector;
    int result = sectors_of(cipher, copy->host_offset, copy->nbytes, &sector);

    if (result < 0)
        return result;
    pieces_load(request->data, start, nbytes, worker->old + copy->ahead);
    gather->iovecs[0] = (struct iovec){worker->old, copy->nbytes};
    gather->count = 1;
    gather->nbytes = copy->nbytes;
    return cipher->encrypt(cipher->context, sector, worker->old, worker->old, copy->nbytes);
}

int request_copy_at_once(struct worker *worker, struct request *request, const struct request_copy *copy,
                         uint64_t start, uint64_t nbytes)
{
    const struct file *file = &worker->files[copy->slot];
    struct iovec iovecs[COPY_PIECES];
    struct gather gather = {.iovecs = iovecs, .limit = COPY_PIECES};
    struct operation operation = {.verb = VERB_WRITE, .slot = copy->slot, .nbytes = copy->nbytes, .data = true};
    int result;

    operation.host_offset = copy->host_offset;
    if (!worker_has_slot(worker, copy->slot) || file->direct_fd >= 0 || copy->nbytes > sizeof(worker->old) ||
        (copy->old_slot != EXTENT_NO_SLOT && !worker_has_slot(worker, copy->old_slot)) ||
        (!copy->cipher && !gather_copy(worker, request, copy, start, nbytes, &gather)))
        return -EAGAIN;
    if (file->error)
        return -EIO;
    worker->now = pace_now();
    if (!at_once_allows(file, copy->nbytes, worker->now) || load_old(worker, copy) < 0 ||
        (copy->cipher && encrypt_copy(worker, request, copy, start, nbytes, &gather) < 0))
        return -EAGAIN;
    if (pieces_have_lost(worker, request->data, start, nbytes))
        return -EFAULT;
    operation.waiter.since = worker->now;
    result = at_once_transfer(worker, &operation, &gather);
    operation_note_latency(worker, &operation);
    if (result < 0)
        return result == -EAGAIN ? -EIO : result;
    return (uint64_t)result == copy->nbytes ? 0 : -EIO;
}

void worker_store_memory(struct worker *worker, uint8_t *memory, uint64_t offset, const void *bytes, uint32_t nbytes)
{
    struct iovec content = {(void *)(uintptr_t)bytes, nbytes};

    host_store(memory + offset, bytes, nbytes);
    if (worker->trace)
        trace_add(worker->trace, (struct trace_record){.kind = TRACE_STORE, .offset = offset, .nbytes = nbytes},
                  &content, 1);
}
