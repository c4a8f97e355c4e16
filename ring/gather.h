/* What an operation moves next: its pieces, past what is done, as iovecs. */
#pragma once

#include "ring/inside.h"

struct gather {
    struct iovec *iovecs; /* NULL: only count */
    uint32_t count;
    uint32_t limit;
    uint64_t nbytes;
};

/* Collect what the next submission moves: `single` if that is one piece, as it
 * mostly is. -EAGAIN: there is no room for more of them now. -ESTALE: a request
 * was finished under its own transfer. */
int gather_submission(struct worker *worker, const struct operation *operation, struct iovec *single,
                      struct gather *gather);

/* Whether it writes what lies, or lay, in memory that has lost a page (pieces_have_lost). */
bool gather_has_lost(struct worker *worker, const struct operation *operation);

/* Whether O_DIRECT takes it. */
bool gather_is_aligned(const struct gather *gather, const struct file *file, uint64_t host_offset);

/* Zero what is left to read: it is past the end of the file. */
void gather_zero_rest(struct worker *worker, const struct operation *operation);
