/* io_uring, as one thread uses it; where the kernel forbids it, threads that take the same entries. */
#pragma once

#include <liburing.h>
#include <stdbool.h>
#include <stdint.h>

#include "ring/threads.h"

#define URING_ENTRIES 256
#define URING_THREADS 32 /* that what waits for a disk may occupy, the kernel's or ours */
#define URING_COMPLETIONS 4096
#define URING_ARENA 8192 /* iovecs that live until they are submitted */

struct uring_completion {
    uint64_t user_data;
    int32_t result;
    bool more; /* of a multishot: it goes on */
};

struct uring {
    struct threads *threads; /* NULL: the ring does the work */
    struct io_uring ring;
    struct iovec *arena;
    uint32_t arena_used;
};

/* Open the ring, or start threads, on the thread that will use it. -> 0 or -errno. */
int uring_init(struct uring *uring, bool use_threads);
void uring_deinit(struct uring *uring);

/* A free submission entry; submits when there is none. NULL only if the kernel refuses to take any. */
struct io_uring_sqe *uring_entry(struct uring *uring);

/* Room for `count` <= 1024 iovecs, good until submitted. Call before uring_entry. */
struct iovec *uring_iovecs(struct uring *uring, uint32_t count);

/* Submit what is pending. -> 0 or -errno. */
int uring_submit(struct uring *uring);

/* Fill in at most `count` completions. -> their number */
uint32_t uring_reap(struct uring *uring, struct uring_completion *completions, uint32_t count);

/* Submit, and sleep until there is a completion, or `milliseconds` have passed if they are not 0. */
int uring_wait(struct uring *uring, uint32_t milliseconds);
