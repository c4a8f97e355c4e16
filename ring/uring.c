#include "ring/uring.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

/* All that we ask of a ring. It takes nothing else: no seccomp filter sees what a ring is told to do. */
static const uint8_t OPCODES[] = {
    IORING_OP_NOP,   IORING_OP_READ,      IORING_OP_READV,    IORING_OP_WRITE,       IORING_OP_WRITEV,
    IORING_OP_FSYNC, IORING_OP_FALLOCATE, IORING_OP_POLL_ADD, IORING_OP_POLL_REMOVE,
};

/* liburing 2.3 declares io_uring_register_restrictions and io_uring_enable_rings, and does not export them. */
static int register_in(struct io_uring *ring, unsigned int what, const void *argument, unsigned int count)
{
    return syscall(SYS_io_uring_register, ring->ring_fd, what, argument, count) < 0 ? -errno : 0;
}

static int restrict_ring(struct io_uring *ring)
{
    struct io_uring_restriction restrictions[sizeof(OPCODES) + 1] = {
        {.opcode = IORING_RESTRICTION_SQE_FLAGS_ALLOWED, .sqe_flags = UINT8_MAX},
    };
    unsigned int limits[2] = {URING_THREADS, 0}; /* for files; what it is for other things stays */
    int result;

    for (size_t i = 0; i < sizeof(OPCODES); i++) {
        restrictions[i + 1].opcode = IORING_RESTRICTION_SQE_OP;
        restrictions[i + 1].sqe_op = OPCODES[i];
    }
    result = register_in(ring, IORING_REGISTER_IOWQ_MAX_WORKERS, limits, 2);
    if (result < 0)
        return result;
    result = register_in(ring, IORING_REGISTER_RESTRICTIONS, restrictions, sizeof(OPCODES) + 1);
    return result < 0 ? result : register_in(ring, IORING_REGISTER_ENABLE_RINGS, NULL, 0);
}

static int open_ring(struct io_uring *ring)
{
    /* One thread submits and reaps, so completions need no interrupt: they run when we ask (Linux 6.1). */
    struct io_uring_params params = {
        .flags = IORING_SETUP_CQSIZE | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
                 IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_R_DISABLED,
        .cq_entries = URING_COMPLETIONS,
    };

    return io_uring_queue_init_params(URING_ENTRIES, ring, &params);
}

/* Whether the ring is of use: a seccomp filter may allow io_uring_setup and forbid io_uring_enter. The kernel makes its
 * first thread for it, and keeps one: work that finds none is cancelled. -> 0 or -errno */
static int try_ring(struct io_uring *ring)
{
    struct io_uring_sqe *entry = io_uring_get_sqe(ring);
    struct io_uring_cqe *completion;
    int result;

    io_uring_prep_nop(entry);
    entry->flags |= IOSQE_ASYNC;
    do
        result = io_uring_submit_and_wait(ring, 1);
    while (result == -EINTR);
    if (result >= 0)
        result = io_uring_peek_cqe(ring, &completion);
    if (result < 0)
        return result;
    io_uring_cqe_seen(ring, completion);
    return 0;
}

static int open_tried_ring(struct io_uring *ring)
{
    int result = open_ring(ring);

    if (result < 0)
        return result;
    result = restrict_ring(ring);
    if (result >= 0)
        result = try_ring(ring);
    if (result < 0)
        io_uring_queue_exit(ring);
    return result;
}

int uring_init(struct uring *uring, bool use_threads)
{
    int result = 0;

    uring->arena_used = 0;
    uring->threads = NULL;
    uring->arena = calloc(URING_ARENA, sizeof(*uring->arena));
    if (!uring->arena)
        return -ENOMEM;
    if (use_threads)
        uring->threads = threads_create(&result);
    else
        result = open_tried_ring(&uring->ring);
    if (result < 0) {
        free(uring->arena);
        uring->arena = NULL;
    }
    return result;
}

void uring_deinit(struct uring *uring)
{
    if (uring->threads)
        threads_destroy(uring->threads);
    else
        io_uring_queue_exit(&uring->ring);
    free(uring->arena);
}

static uint32_t pending(const struct uring *uring)
{
    return uring->threads ? threads_pending(uring->threads) : io_uring_sq_ready(&uring->ring);
}

static int submit_to_ring(struct uring *uring)
{
    while (io_uring_sq_ready(&uring->ring)) {
        int result = io_uring_submit(&uring->ring);
        if (result < 0 && result != -EINTR && result != -EAGAIN && result != -EBUSY)
            return result;
        if (result <= 0)
            return 0; /* the kernel wants completions reaped first; what is left goes with the next call */
    }
    return 0;
}

int uring_submit(struct uring *uring)
{
    int result = 0;

    if (uring->threads)
        threads_submit(uring->threads);
    else
        result = submit_to_ring(uring);
    /* IORING_FEAT_SUBMIT_STABLE: a submitted entry has been copied, iovecs included. */
    if (!pending(uring))
        uring->arena_used = 0;
    return result;
}

static struct io_uring_sqe *free_entry(struct uring *uring)
{
    return uring->threads ? threads_entry(uring->threads) : io_uring_get_sqe(&uring->ring);
}

struct io_uring_sqe *uring_entry(struct uring *uring)
{
    struct io_uring_sqe *entry = free_entry(uring);
    uint32_t used = uring->arena_used; /* with the iovecs of the entry to come */

    if (!entry && uring_submit(uring) == 0)
        entry = free_entry(uring);
    uring->arena_used = used;
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

static uint32_t reap_ring(struct io_uring *ring, struct uring_completion *completions, uint32_t count)
{
    struct io_uring_cqe *entry;
    uint32_t filled = 0;

    while (filled < count && io_uring_peek_cqe(ring, &entry) == 0) {
        completions[filled++] = (struct uring_completion){entry->user_data, entry->res, entry->flags & IORING_CQE_F_MORE};
        io_uring_cqe_seen(ring, entry);
    }
    return filled;
}

uint32_t uring_reap(struct uring *uring, struct uring_completion *completions, uint32_t count)
{
    if (uring->threads)
        return threads_reap(uring->threads, completions, count);
    return reap_ring(&uring->ring, completions, count);
}

int uring_wait(struct uring *uring, uint32_t milliseconds)
{
    struct __kernel_timespec timeout = {.tv_nsec = milliseconds * 1000000ll};
    struct io_uring_cqe *completion;
    int result;

    if (uring->threads) {
        result = uring_submit(uring);
        return result < 0 ? result : threads_wait(uring->threads, milliseconds);
    }
    if (milliseconds)
        result = io_uring_submit_and_wait_timeout(&uring->ring, &completion, 1, &timeout, NULL);
    else
        result = io_uring_submit_and_wait(&uring->ring, 1);
    if (!io_uring_sq_ready(&uring->ring))
        uring->arena_used = 0;
    return result == -ETIME || result == -EINTR || result == -EAGAIN || result == -EBUSY || result > 0 ? 0 : result;
}
