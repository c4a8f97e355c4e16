/* io_uring's entries carried out by threads, for hosts that forbid io_uring.
 *
 * One thread, the owner, prepares entries and reaps completions, as with a
 * ring. Known are reads, writes, fsync, fallocate, and multishot polls, which
 * an epoll does; anything else completes with -EINVAL. A transfer of many
 * iovecs may be short where a ring's would not be.
 */
#pragma once

#include <stdint.h>

struct io_uring_sqe;
struct uring_completion;
struct threads;

/* Carry an entry out on this very thread. -> its completion's result */
int threads_perform(const struct io_uring_sqe *entry);

/* NULL and *error = -errno if there is no memory, no epoll, or no thread. */
struct threads *threads_create(int *error);

/* What is under way is finished first. */
void threads_destroy(struct threads *threads);

/* A zeroed entry, NULL if there is none: submit or reap. */
struct io_uring_sqe *threads_entry(struct threads *threads);

/* How many entries were prepared and not taken by threads_submit. */
uint32_t threads_pending(const struct threads *threads);

/* Take prepared entries, iovecs included, in order, as long as there is room. */
void threads_submit(struct threads *threads);

/* Fill in at most `count` completions. -> their number */
uint32_t threads_reap(struct threads *threads, struct uring_completion *completions, uint32_t count);

/* Sleep until there is a completion, or `milliseconds` have passed if they are not 0. -> 0 or -errno */
int threads_wait(struct threads *threads, uint32_t milliseconds);
