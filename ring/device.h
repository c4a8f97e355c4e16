/* What a device asks of the worker that serves it. */
#pragma once

#include "ring/worker.h"

/* Begin moving the request's data from `start` to or from the extent; device->end comes after
 * the last part. Bracket all of a request's transfers with hold and release. */
void request_hold(struct request *request);
void request_transfer(struct worker *worker, struct request *request, bool is_write, const struct extent *extent,
                      uint64_t start);
void request_release(struct worker *worker, struct request *request, int result);

/* Write nbytes of the request's data from `start` on this thread. -> 0, -EAGAIN: not now, nothing was written, or
 * how it failed, perhaps in the middle. */
int request_write_at_once(struct worker *worker, struct request *request, uint32_t slot, uint64_t host_offset,
                          uint64_t start, uint64_t nbytes);

/* Read the old bytes, write them with nbytes of the request's data from `start` in their midst, on this thread.
 * -> 0, -EAGAIN: not now, nothing was written, or how it failed, perhaps in the middle. */
int request_copy_at_once(struct worker *worker, struct request *request, const struct request_copy *copy,
                         uint64_t start, uint64_t nbytes);

#define REQUEST_COPY_NBYTES (256u << 10)

/* The same through the kernel, of at most so many bytes; as request_transfer, device->end comes after the last part,
 * and *copy is borrowed until then. */
void request_copy(struct worker *worker, struct request *request, const struct request_copy *copy, uint64_t start,
                  uint64_t nbytes);

/* What a device lends its extent map for one request: reads on this thread of what is in the page cache. */
struct table_reader {
    struct extent_reader reader; /* first: the map knows only this */
    struct worker *worker;
    uint32_t left;
};

struct table_reader worker_table_reader(struct worker *worker);

/* The same for what it changes: writes on this thread, if the file is quick enough. */
struct table_writer {
    struct extent_writer writer; /* first: the map knows only this */
    struct worker *worker;
};

struct table_writer worker_table_writer(struct worker *worker);

/* Whether metadata may be written on this thread: it is not known to hold it up. */
bool worker_allows_entry(struct worker *worker, uint32_t slot, uint32_t nbytes);

/* Write metadata, which is borrowed until device->end comes; as request_transfer. */
void request_write_entry(struct worker *worker, struct request *request, uint32_t slot, uint64_t host_offset,
                         const void *bytes, uint32_t nbytes);

/* Write metadata on this thread, however long that takes. -> 0 or how it failed. */
int worker_write_entry(struct worker *worker, uint32_t slot, uint64_t host_offset, const void *bytes, uint32_t nbytes);

/* The same for up to 8 bytes from an offset that 8 divides; cheap where it is done often. */
int worker_write_word(struct worker *worker, uint32_t slot, uint64_t host_offset, const void *bytes, uint32_t nbytes);

/* Put bytes into memory that outlives the process, and record that. */
void worker_store_memory(struct worker *worker, uint8_t *memory, uint64_t offset, const void *bytes, uint32_t nbytes);

/* Let whoever awaits a grace from now on wait for us, too. -> what worker_leave_grace takes */
uint32_t worker_join_grace(struct worker *worker);
void worker_leave_grace(struct worker *worker, uint32_t epoch);

/* Wait for an fdatasync of the file that starts after now; device->end comes after it. */
void request_sync(struct worker *worker, struct request *request, uint32_t slot);

/* Whether the memory of nbytes from `start` of the pieces has lost a page since it was mapped: what was read there, by
 * whomever, may be zeros that were never there. To be asked after the bytes were copied. */
bool pieces_have_lost(struct worker *worker, const struct iovec *pieces, uint64_t start, uint64_t nbytes);

/* Record that it was asked for, and that its answer, `status`, is about to be seen. */
void request_trace(struct worker *worker, struct request *request, uint32_t flags);
void request_trace_answer(struct worker *worker, const struct request *request, int status);

/* Leave it to Python, as a request of its own type or another. */
void request_punt(struct worker *worker, struct request *request, uint32_t type);

/* It waits for the device alone, and nobody who awaits all that is under way waits for it, until it is taken up. */
void request_park(struct worker *worker, struct request *request);
void request_take_up(struct worker *worker, struct request *request);

/* Give the chain back: `nbytes` were written to it. The request is gone. */
void request_complete(struct worker *worker, struct request *request, uint32_t nbytes);

static inline bool worker_has_slot(const struct worker *worker, uint32_t slot)
{
    return slot < worker->file_count && worker->files[slot].fd >= 0;
}

/* Data goes by O_DIRECT, never on this thread. */
static inline bool worker_slot_is_direct(const struct worker *worker, uint32_t slot)
{
    return worker->files[slot].direct_fd >= 0;
}

/* All that was written to it, by whomever, is stable. */
static inline bool worker_slot_is_stable(const struct worker *worker, uint32_t slot)
{
    return !worker->files[slot].dirty && !worker->files[slot].syncing;
}

/* Whether another request may begin transfers, as a fetched one may: fetching sees to it. */
static inline bool worker_has_operations(const struct worker *worker)
{
    return worker->free_operations >= WORKER_ASIDE;
}

/* An fdatasync of the file failed: it takes no more writes. */
static inline bool worker_slot_failed(const struct worker *worker, uint32_t slot)
{
    return worker->files[slot].error != 0;
}

static inline void line_init(struct line *line)
{
    line->first = NULL;
    line->last = &line->first;
}

static inline void line_join(struct line *line, struct waiter *waiter)
{
    waiter->next = NULL;
    *line->last = waiter;
    line->last = &waiter->next;
}

static inline struct waiter *line_leave(struct line *line)
{
    struct waiter *first = line->first;

    if (first) {
        line->first = first->next;
        if (!line->first)
            line->last = &line->first;
    }
    return first;
}

/* Move all of `from`, in order, to the empty line `to`. */
static inline void line_move(struct line *to, struct line *from)
{
    ASSERT(!to->first);
    line_init(to);
    for (struct waiter *waiter; (waiter = line_leave(from));)
        line_join(to, waiter);
}
