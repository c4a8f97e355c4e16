/* The host: everything that a worker asks of the kernel, beside `uring.h`, `storage.h` and mappings of memory.
 *
 * A call never waits for another process unless it says so. Nothing above knows
 * who answers: `host.c` makes system calls; the simulator of the tests links
 * its own kernel in place of `host.c`, `storage.c`, `uring.c` and `threads.c`.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

struct io_uring_sqe;

/* ns of a clock that only goes forward. */
uint64_t host_now(void);

/* Read what is in the page cache. A file in memory is: what of it is swapped out is waited for. -> bytes, 0 at the end of
 * the file, or -errno; -EAGAIN: it would wait. */
int64_t host_read_cached(int fd, const struct iovec *iovecs, uint32_t count, uint64_t host_offset, bool is_memory);
/* Write to the page cache; the host may make the writer wait. -> bytes, or -errno. */
int64_t host_write(int fd, const struct iovec *iovecs, uint32_t count, uint64_t host_offset);
/* fdatasync; waits for the disk. -> 0 or -errno */
int host_sync(int fd);
/* Begin to send what is dirty to the disk. -> 0 or -errno */
int host_write_ahead(int fd);
/* Let *nbytes be where the file ends; UINT64_MAX if it has no length of its own. As far as this host knows: a server,
 * which may hang, is not asked, and nobody else changes a file that we have locked. -> 0 or -errno */
int host_length(int fd, uint64_t *nbytes);
/* Carry a transfer, fsync or fallocate out on this very thread, however long that takes. -> its completion's result */
int host_perform(const struct io_uring_sqe *entry);

/* Put bytes into memory that outlives this process, and not the host. */
void host_store(uint8_t *memory, const void *bytes, uint32_t nbytes);

#define HOST_PAGE 4096u

/* nbytes of the file, shared with the page cache: past its end there is nothing but *losses (loss.h).
 * -> NULL: not to be had */
uint8_t *host_map_file(int fd, uint64_t nbytes, bool writable, uint32_t *losses);
void host_unmap_file(const uint8_t *bytes, uint64_t nbytes);
/* Whether the page cache holds so many pages of a mapping, as far as the kernel says: none that is still being read. */
#define HOST_STRETCH 64u
bool host_holds(const uint8_t *bytes);
/* How often this thread waited for the disk because a page that it touched was not there. */
uint64_t host_waits(void);

/* What O_DIRECT on the file wants, powers of two. */
struct host_alignment {
    uint32_t memory;
    uint32_t offset;
};
struct host_alignment host_alignment(int fd);

/* ---- eventfds and what is given in their place; some are shared with the front-end ---- */

/* Whether a poll of the fd ever waits: files, disks and directories are always ready and would keep us spinning. */
bool host_is_waitable(int fd);
/* A full or closed fd is the loss of whoever waits there. Waits only if another process changes its flags meanwhile. */
void host_signal(int fd);
/* -> whether there was a signal. */
bool host_take_signal(int fd);
void host_close(int fd);

/* ---- the worker's thread ---- */

/* Let others run who want this core. */
void host_yield(void);

/* Let host_nudge end a system call that this thread sleeps in. -> what names the thread */
int host_expect_nudges(void);
void host_nudge(int thread);
