/* Group commit and grace: lines of waiters that one fdatasync, or one epoch, serves together. */
#include <errno.h>
#include <stddef.h>

#include "ring/assertion.h"
#include "ring/inside.h"

#define LONE_REQUESTS 64 /* that no other queue came between: only one is in use */
#define QUICK_SYNCS 8    /* in a row: the next will be one, too */
#define INTERRUPTIONS_MAX 100 /* in a row; near files are asked until they answer */
#define AHEAD_NBYTES (1u << 20) /* with no more than so much dirty, starting to write it holds nobody up */

static void serve(struct worker *worker, struct waiter *waiter, int result)
{
    if (waiter->request)
        worker->device->end(worker->device, worker, waiter->request, result);
    else
        worker_tell(worker, (struct worker_event){.kind = EVENT_DONE, .result = result, .id = waiter->operation});
}

static void serve_line(struct worker *worker, struct line *line, int result)
{
    for (struct waiter *waiter; (waiter = line_leave(line));)
        serve(worker, waiter, result);
}

static void join(struct worker *worker, uint32_t slot, struct waiter *waiter)
{
    struct file *file = &worker->files[slot];

    worker->counters->sync_waiters++;
    waiter->since = worker->now;
    if (file->error || !file->syncs) {
        serve(worker, waiter, file->error ? -EIO : 0);
        return;
    }
    line_join(&file->waiting, waiter);
    file->joined = true;
}

void request_sync(struct worker *worker, struct request *request, uint32_t slot)
{
    join(worker, slot, &request->waiter);
}

int worker_sync(struct worker *worker, uint32_t slot)
{
    int number = worker_has_slot(worker, slot) ? operation_begin(worker, NULL) : -EBADF;

    if (number >= 0)
        join(worker, slot, &worker->operations[number].waiter);
    return number;
}

/* Whoever waits now is served by a sync that starts now: after they joined. */
static void starts(struct worker *worker, uint32_t slot)
{
    struct file *file = &worker->files[slot];

    ASSERT(!file->syncing && !file->served.first);
    line_move(&file->served, &file->waiting);
    file->syncing = true;
    file->joined = false;
    file->syncing_dirty = file->dirty;
    file->dirty = 0;
    file->sync_began = worker->now = pace_now();
    if (worker->trace)
        file->trace_id = trace_sync(worker->trace, slot);
    worker->submitted++;
    if (file->storage == STORAGE_FAR)
        turn_occupy(worker, file);
    worker->counters->syncs++;
}

/* Whether the sync, if it is as quick as they lately were, holds nobody up: one request waits, be it through Python,
 * nothing else is under way, no other queue is in use, and the driver has heard of all that is done. */
static bool is_lone(struct worker *worker, const struct file *file)
{
    const struct waiter *waiter = file->waiting.first;

    return storage_is_near(file->storage) && file->quick_syncs >= QUICK_SYNCS && worker->lone_count >= LONE_REQUESTS &&
           worker->requests_in_flight == 1 && !worker->submitted && !worker->dirty_count && !waiter->next &&
           pace_allows(&file->sync_pace, worker->now = pace_now());
}

/* On this thread, which saves the lone writer two wake-ups. */
static void sync_at_once(struct worker *worker, uint32_t slot)
{
    struct file *file = &worker->files[slot];
    int result;

    starts(worker, slot);
    result = host_sync(file->fd);
    worker->counters->immediate_syncs++;
    worker->counters->stalls += pace_note(&file->sync_pace, file->sync_began, worker->now = pace_now());
    commit_completed(worker, slot, result);
}

static void start(struct worker *worker, uint32_t slot)
{
    struct file *file = &worker->files[slot];
    struct io_uring_sqe *entry;

    if (is_lone(worker, file)) {
        sync_at_once(worker, slot);
        return;
    }
    entry = uring_entry(&worker->uring);
    if (!entry)
        return; /* they go on waiting; the next round tries again */
    io_uring_prep_fsync(entry, file->fd, IORING_FSYNC_DATASYNC);
    io_uring_sqe_set_data64(entry, tagged(TAG_SYNC, slot, 0));
    starts(worker, slot);
}

/* The kernel may have marked the lost pages clean, so a later sync that succeeds proves nothing. */
static void fail(struct worker *worker, uint32_t slot, int result)
{
    struct file *file = &worker->files[slot];

    file->error = -result;
    file->joined = false;
    worker_tell(worker, (struct worker_event){.kind = EVENT_SYNC_FAILED, .result = result, .id = slot});
    serve_line(worker, &file->waiting, -EIO);
}

/* Send what is dirty to the disk. This makes nothing stable, but the sync that does finds less to do. */
static void write_ahead(struct worker *worker, uint32_t slot)
{
    struct file *file = &worker->files[slot];
    uint64_t began = worker->now = pace_now();
    int result;

    file->joined = false;
    if (file->storage != STORAGE_NEAR || file->dirty + file->syncing_dirty > AHEAD_NBYTES || !pace_allows(&file->sync_pace, began))
        return;
    result = host_write_ahead(file->fd);
    worker->counters->stalls += pace_note(&file->sync_pace, began, worker->now = pace_now());
    if (result == -EIO || result == -ENOSPC || result == -EDQUOT || result == -EROFS)
        fail(worker, slot, result);
}

/* For whoever has to wait for the disk anyway: let it begin while more writes come in. */
void commits_write_ahead(struct worker *worker)
{
    for (uint32_t slot = 0; slot < worker->file_count; slot++)
        if (worker->files[slot].joined)
            write_ahead(worker, slot);
}

void commits_start(struct worker *worker)
{
    for (uint32_t slot = 0; slot < worker->file_count; slot++)
        if (worker->files[slot].waiting.first && !worker->files[slot].syncing)
            start(worker, slot);
    commits_write_ahead(worker); /* of those that wait behind another sync */
}

/* A sync that was interrupted is done anew, for all who wait by now. */
static void wait_again(struct file *file)
{
    for (struct waiter *waiter; (waiter = line_leave(&file->waiting));)
        line_join(&file->served, waiter);
    line_move(&file->waiting, &file->served);
}

static bool is_interrupted(struct file *file, int result)
{
    file->interruptions = result == -EINTR ? file->interruptions + 1 : 0;
    return file->interruptions && file->interruptions <= INTERRUPTIONS_MAX;
}

void commit_completed(struct worker *worker, uint32_t slot, int result)
{
    struct file *file = &worker->files[slot];
    bool again = is_interrupted(file, result);
    bool untried = again || (result == -ECANCELED && file->storage == STORAGE_FAR);

    /* The kernel could make no thread for it: nothing was tried, so nothing has failed, but for those who wait. */
    if (result == -ECANCELED && !untried)
        result = host_sync(file->fd);
    ASSERT(file->syncing && worker->submitted);
    worker->submitted--;
    if (file->storage == STORAGE_FAR)
        turn_vacate(worker, file);
    worker->progress = true;
    file->syncing = false;
    if (again)
        wait_again(file);
    file->dirty += untried ? file->syncing_dirty : 0;
    file->syncing_dirty = 0;
    file->quick_syncs = worker->now - file->sync_began < PACE_STALL_NS ? file->quick_syncs + 1 : 0;
    if (worker->trace)
        trace_done(worker->trace, file->trace_id, result);
    if (result < 0 && !untried && !file->error)
        fail(worker, slot, result);
    for (const struct waiter *waiter = file->served.first; waiter; waiter = waiter->next)
        histogram_add(&worker->statistics.sync, worker->now - waiter->since);
    serve_line(worker, &file->served, file->error ? -EIO : untried ? result : 0);
    operations_advance(worker);
}

void grace_advance(struct worker *worker)
{
    struct grace *grace = &worker->grace;

    for (;;) {
        if (grace->running && grace->in_flight[!grace->epoch])
            return;
        serve_line(worker, &grace->served, 0);
        grace->running = grace->waiting.first != NULL;
        if (!grace->running)
            return;
        line_move(&grace->served, &grace->waiting);
        grace->epoch = !grace->epoch;
    }
}

uint32_t worker_join_grace(struct worker *worker)
{
    worker->grace.in_flight[worker->grace.epoch]++;
    return worker->grace.epoch;
}

void worker_leave_grace(struct worker *worker, uint32_t epoch)
{
    ASSERT(worker->grace.in_flight[epoch]);
    worker->grace.in_flight[epoch]--;
}

int worker_grace(struct worker *worker)
{
    int number = operation_begin(worker, NULL);

    if (number < 0)
        return number;
    line_join(&worker->grace.waiting, &worker->operations[number].waiter);
    grace_advance(worker); /* closes the epoch now, so that what begins next is not waited for */
    return number;
}
