#include "ring/uring.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>

int uring_init(struct uring *uring)
{
    /* One thread submits and reaps, so completions need no interrupt: they run when we ask (Linux 6.1). */
    struct io_uring_params params = {
        .flags = IORING_SETUP_CQSIZE | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
                 IORING_SETUP_TASKRUN_FLAG,
        .cq_entries = URING_COMPLETIONS,
    };
    int result;

    uring->arena_used = 0;
    uring->arena = calloc(URING_ARENA, sizeof(*uring->arena));
    if (!uring->arena)
        return -ENOMEM;
    result = io_uring_queue_init_params(URING_ENTRIES, &uring->ring, &params);
    if (result < 0) {
        free(uring->arena);
        uring->arena = NULL;
    }
    return result;
}

void uring_deinit(struct uring *uring)
{
    io_uring_queue_exit(&uring->ring);
    free(uring->arena);
}

int uring_submit(struct uring *uring)
{
    while (io_uring_sq_ready(&uring->ring)) {
        int result = io_uring_submit(&uring->ring);
        if (result < 0 && result != -EINTR && result != -EAGAIN && result != -EBUSY)
            return result;
        if (result <= 0)
            return 0; /* the kernel wants completions reaped first; what is left goes with the next call */
    }
    /* IORING_FEAT_SUBMIT_STABLE: a submitted entry has been copied, iovecs included. */
    uring->arena_used = 0;
    return 0;
}

struct io_uring_sqe *uring_entry(struct uring *uring)
{
    struct io_uring_sqe *entry = io_uring_get_sqe(&uring->ring);

    if (!entry && uring_submit(uring) == 0)
        entry = io_uring_get_sqe(&uring->ring);
    return entry;
}

struct iovec *uring_iovecs(struct uring *uring, uint32_t count)
{
    struct iovec *iovecs;

    if (uring->arena_used + count > URING_ARENA)
        uring_submit(uring);
    if (uring->arena_used + count > URING_ARENA)
        return NULL;
    iovecs = uring->arena + uring->arena_used;
    uring->arena_used += count;
    return iovecs;
}

int uring_wait(struct uring *uring, uint32_t milliseconds)
{
    struct __kernel_timespec timeout = {.tv_nsec = milliseconds * 1000000ll};
    struct io_uring_cqe *completion;
    int result;

    if (milliseconds)
        result = io_uring_submit_and_wait_timeout(&uring->ring, &completion, 1, &timeout, NULL);
    else
        result = io_uring_submit_and_wait(&uring->ring, 1);
    if (!io_uring_sq_ready(&uring->ring))
        uring->arena_used = 0;
    return result == -ETIME || result == -EINTR || result == -EAGAIN || result == -EBUSY || result > 0 ? 0 : result;
}
