/* What the worker's own files ask of one another. */
#pragma once

#include "ring/device.h"

void worker_tell(struct worker *worker, struct worker_event event);

static inline void worker_meets_peer(struct worker *worker, bool now)
{
    __atomic_store_n(&worker->at_peer, now, __ATOMIC_RELAXED);
}

static inline uint64_t request_id(const struct request *request)
{
    return (uint64_t)request->generation << 32 | (uint32_t)request->queue->index << 16 | request->head;
}
/* NULL: not in flight (any more). */
struct request *worker_request(struct worker *worker, uint64_t id);

/* request.c */
void request_begin(struct worker *worker, struct queue *queue, const struct chain *chain);

/* queue.c */
bool queue_has_lost(struct worker *worker, struct queue *queue); /* -> whether it broke because its memory is gone */
void queue_show(struct worker *worker, struct queue *queue); /* a used element was pushed */
void queues_fetch(struct worker *worker);
void queues_publish(struct worker *worker);
bool queues_arm(struct worker *worker); /* -> true: look again before sleeping */
bool queues_poll(const struct worker *worker);
void queue_kicked(struct worker *worker, uint32_t index, uint32_t generation, int result, bool more);
void queue_close(struct worker *worker, struct queue *queue);

/* operation.c */
int operation_begin(struct worker *worker, struct request *request); /* -> number or -EBUSY; a verb is to follow */
void operation_free(struct worker *worker, uint32_t number);

/* transfer.c */
void operation_submit(struct worker *worker, uint32_t number); /* to the kernel, for the first time or to go on */
void operation_completed(struct worker *worker, uint32_t number, int result);
void operations_retry(struct worker *worker);
void operations_tell_room(struct worker *worker); /* or Python, which was refused one, would wait for what never comes */
void operations_advance(struct worker *worker); /* a turn has ended */

/* turn.c */
bool turn_is_now(const struct worker *worker, const struct operation *operation); /* -> false: turn_wait */
void turn_wait(struct worker *worker, uint32_t number);
uint32_t turn_next(struct worker *worker); /* -> the operation whose turn has come, or WORKER_OPERATIONS */
void turn_occupy(struct worker *worker, struct file *file);
void turn_vacate(struct worker *worker, struct file *file);
void turn_begin(struct worker *worker, struct operation *operation); /* the kernel has it */
void turn_end(struct worker *worker, struct operation *operation);   /* and has not any more */
void turns_forget(struct worker *worker);                            /* those who wait never begin */

/* commit.c */
void commits_start(struct worker *worker);
void commits_write_ahead(struct worker *worker);
void commit_completed(struct worker *worker, uint32_t slot, int result);
void grace_advance(struct worker *worker);

/* user_data of a submission: tag | number << 8 | generation << 32 */
enum tag { TAG_NOTHING, TAG_OPERATION, TAG_SYNC, TAG_KICK, TAG_CONTROL };
static inline uint64_t tagged(enum tag tag, uint32_t number, uint32_t generation)
{
    return (uint64_t)generation << 32 | (uint64_t)number << 8 | tag;
}
