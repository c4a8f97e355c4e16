/* Turns: who of a far file's operations may be in the kernel, and who waits for others to end.
 *
 * Where a file may hang, so may the threads that carry out its operations:
 * io_uring's or ours, of which there are URING_THREADS. Far files share them.
 */
#include "ring/assertion.h"
#include "ring/share.h"
#include "ring/inside.h"

#define FAR_THREADS (URING_THREADS - 2) /* near files need some, too */

static bool is_full(const struct worker *worker, const struct file *file)
{
    return worker->far_occupying >= FAR_THREADS ||
           !share_allows(file->occupying, FAR_THREADS - worker->far_occupying);
}

bool turn_is_now(const struct worker *worker, const struct operation *operation)
{
    const struct file *file = &worker->files[operation->slot];

    if (file->storage != STORAGE_FAR)
        return true;
    return (operation->has_turn || file->first_waiting == WORKER_OPERATIONS) && !is_full(worker, file);
}

void turn_wait(struct worker *worker, uint32_t number)
{
    struct operation *operation = &worker->operations[number];
    struct file *file = &worker->files[operation->slot];

    operation->next = WORKER_OPERATIONS;
    if (file->first_waiting == WORKER_OPERATIONS) {
        file->first_waiting = number;
        worker->waiting_files++;
    } else {
        worker->operations[file->last_waiting].next = number;
    }
    file->last_waiting = number;
}

static uint32_t leave(struct worker *worker, struct file *file)
{
    uint32_t number = file->first_waiting;

    ASSERT(worker->waiting_files && worker->operations[number].verb > VERB_WAIT);
    file->first_waiting = worker->operations[number].next;
    worker->waiting_files -= file->first_waiting == WORKER_OPERATIONS;
    worker->operations[number].has_turn = true;
    return number;
}

uint32_t turn_next(struct worker *worker)
{
    for (uint32_t slot = 0; worker->waiting_files && slot < worker->file_count; slot++) {
        struct file *file = &worker->files[slot];
        if (worker_has_slot(worker, slot) && file->first_waiting != WORKER_OPERATIONS &&
            !is_full(worker, file))
            return leave(worker, file);
    }
    return WORKER_OPERATIONS;
}

void turn_occupy(struct worker *worker, struct file *file)
{
    file->occupying++;
    worker->far_occupying++;
}

void turn_vacate(struct worker *worker, struct file *file)
{
    ASSERT(file->occupying && worker->far_occupying >= file->occupying);
    file->occupying--;
    worker->far_occupying--;
}

void turn_begin(struct worker *worker, struct operation *operation)
{
    struct file *file = &worker->files[operation->slot];

    operation->has_turn = false;
    operation->occupies = file->storage == STORAGE_FAR;
    if (operation->occupies)
        turn_occupy(worker, file);
}

void turn_end(struct worker *worker, struct operation *operation)
{
    if (operation->occupies)
        turn_vacate(worker, &worker->files[operation->slot]);
    operation->occupies = false;
}

void turns_forget(struct worker *worker)
{
    for (uint32_t slot = 0; slot < worker->file_count; slot++)
        worker->files[slot].first_waiting = WORKER_OPERATIONS;
    worker->waiting_files = 0;
}
