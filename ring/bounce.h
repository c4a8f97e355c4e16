/* Bytes that do not move as they are: encrypted, copied, or put where O_DIRECT takes them, in memory of ours. */
#pragma once

#include "ring/gather.h"

void bounce_free(struct worker *worker, struct operation *operation);

/* What a submission moved is in its file. What is copied stays until all of it is written. */
static inline void bounce_drop(struct worker *worker, struct operation *operation)
{
    if (operation->bounce && !operation->copy)
        bounce_free(worker, operation);
}

static inline bool bounces(const struct operation *operation)
{
    return operation->copy || (operation->cipher && operation->verb == VERB_WRITE);
}

/* Let *gather be what the next submission of one that bounces moves.
 * -> 0; -EAGAIN: others have to end first; -ENOMEM; or how its encryption failed. */
int bounce_gather(struct worker *worker, struct operation *operation, struct iovec *single, struct gather *gather);

/* Let *gather be a copy of its front that O_DIRECT takes. -> 0, -EAGAIN or -ENOMEM. */
int bounce_front(struct worker *worker, struct operation *operation, struct iovec *single, struct gather *gather);

/* The old bytes of a copy are here: put the request's among them. -> 0, or how a cipher failed. */
int bounce_merge(struct operation *operation);

/* Decrypt all that was read, where it is. -> 0 or -errno */
int bounce_decrypt(const struct operation *operation);
