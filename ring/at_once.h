/* Transfers on the worker's own thread: for what costs less than coming back for its end (see pace.h). */
#pragma once

#include "ring/gather.h"

/* Whether the file takes nbytes at once, as of `now`. */
bool at_once_allows(const struct file *file, uint64_t nbytes, uint64_t now);

/* Read what is in the page cache, or write to it. -> bytes, or -errno; -EAGAIN: it would wait. */
int at_once_transfer(struct worker *worker, struct operation *operation, const struct gather *gather);

/* ---- of operation.c and transfer.c ---- */

void operation_note_latency(struct worker *worker, const struct operation *operation);
void operation_trace_transfer(struct worker *worker, struct operation *operation, const struct gather *gather);
/* -> 0; -ESTALE, -EINVAL: a request of Python's that it is a part of is gone, or shorter. */
int operation_check_piece(struct worker *worker, const struct piece *piece);
