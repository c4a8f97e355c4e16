/* The dirty log: a bit for each 4 KiB of guest memory that we have written.
 * Spec: vhost-user "Migration".
 *
 * The bitmap is shared with the front-end, which takes bits away while we set
 * them. A bit is set after its bytes were written.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#define DIRTY_LOG_PAGE 4096u

struct dirty_log {
    uint8_t *bits; /* NULL: there is no log */
    uint64_t nbytes;
    int call_fd;   /* signalled after bits were set; -1: nobody asked */
    bool buffers;  /* log what requests write (VHOST_F_LOG_ALL) */
    bool is_dirty; /* bits were set since call_fd was signalled */
};

/* Pages past the end of the log are not logged, as in the kernel's vhost. */
static inline void dirty_log_mark(struct dirty_log *log, uint64_t guest_address, uint64_t nbytes)
{
    uint64_t end, limit = log->nbytes * 8;

    if (nbytes == 0 || __builtin_add_overflow(guest_address, nbytes - 1, &end))
        return;
    for (uint64_t page = guest_address / DIRTY_LOG_PAGE; page <= end / DIRTY_LOG_PAGE && page < limit; page++)
        __atomic_fetch_or(&log->bits[page / 8], (uint8_t)(1u << page % 8), __ATOMIC_SEQ_CST);
    log->is_dirty = true;
}
