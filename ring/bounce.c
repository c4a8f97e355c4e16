#include "ring/bounce.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

#include "ring/assertion.h"
#include "ring/pieces.h"

#define BOUNCE_NBYTES (256u << 10)    /* of one submission */
#define BOUNCE_ALL_NBYTES (16u << 20) /* of all that are under way */
#define BOUNCE_ALIGNMENT 4096u

_Static_assert(REQUEST_COPY_NBYTES <= BOUNCE_NBYTES, "a copy is bounced as a whole");

void bounce_free(struct worker *worker, struct operation *operation)
{
    ASSERT(worker->bounce_nbytes >= operation->bounce_nbytes);
    worker->bounce_nbytes -= operation->bounce_nbytes;
    if (operation->bounce && worker->idle_bounces < IDLE_BOUNCES)
        worker->bounces[worker->idle_bounces++] = operation->bounce;
    else
        free(operation->bounce);
    operation->bounce = NULL;
    operation->bounce_nbytes = 0;
}

/* Memory for the front of what is to be written. -> 0; -EAGAIN: others have to end first; -ENOMEM. */
static int take(struct worker *worker, struct operation *operation, uint32_t nbytes)
{
    if (worker->bounce_nbytes && worker->bounce_nbytes + nbytes > BOUNCE_ALL_NBYTES)
        return -EAGAIN;
    if (worker->idle_bounces)
        operation->bounce = worker->bounces[--worker->idle_bounces];
    else if (posix_memalign((void **)&operation->bounce, BOUNCE_ALIGNMENT, BOUNCE_NBYTES))
        return -ENOMEM;
    operation->bounce_nbytes = nbytes;
    worker->bounce_nbytes += nbytes;
    return 0;
}

static void gather_one(struct iovec *single, struct gather *gather, uint8_t *bytes, uint64_t nbytes)
{
    *single = (struct iovec){bytes, nbytes};
    *gather = (struct gather){.iovecs = single, .count = 1, .limit = 1, .nbytes = nbytes};
}

static uint64_t cipher_sector(const struct operation *operation, uint64_t done)
{
    return (operation->host_offset + done - operation->cipher->origin) / EXTENT_SECTOR;
}

/* Sectors in several pieces go through a buffer. */
int bounce_decrypt(const struct operation *operation)
{
    const struct extent_cipher *cipher = operation->cipher;
    const struct iovec *data = operation->request->data;
    uint8_t scattered[EXTENT_SECTOR];
    uint64_t done = 0;
    int result = 0;

    while (done < operation->nbytes && result == 0) {
        struct piece_walk walk = pieces_walk(data, operation->piece.start + done, operation->nbytes - done);
        uint64_t run = 0, sector = cipher_sector(operation, done);
        struct iovec stretch;

        if (pieces_next(&walk, &stretch))
            run = stretch.iov_len - stretch.iov_len % EXTENT_SECTOR;
        if (run) {
            result = cipher->decrypt(cipher->context, sector, stretch.iov_base, stretch.iov_base, run);
        } else {
            run = EXTENT_SECTOR;
            pieces_load(data, operation->piece.start + done, run, scattered);
            result = cipher->decrypt(cipher->context, sector, scattered, scattered, run);
            pieces_store(data, operation->piece.start + done, run, scattered);
        }
        done += run;
    }
    return result;
}

/* Let *gather be the front of what is left to write, encrypted. -> 0; as take, < 0; or how that failed. */
static int encrypt(struct worker *worker, struct operation *operation, struct iovec *single, struct gather *gather)
{
    const struct extent_cipher *cipher = operation->cipher;
    uint64_t left = operation->nbytes - operation->progress;
    uint32_t nbytes = left < BOUNCE_NBYTES ? left : BOUNCE_NBYTES;
    struct piece_walk walk = pieces_walk(operation->request->data, operation->piece.start + operation->progress, nbytes);
    const uint8_t *from;
    struct iovec whole;
    int result = take(worker, operation, nbytes);

    if (result < 0)
        return result;
    from = operation->bounce;
    if (pieces_next(&walk, &whole) && whole.iov_len == nbytes)
        from = whole.iov_base; /* in one piece it need not be copied */
    else
        pieces_load(operation->request->data, operation->piece.start + operation->progress, nbytes, operation->bounce);
    result = cipher->encrypt(cipher->context, cipher_sector(operation, operation->progress), from, operation->bounce,
                             nbytes);
    if (result < 0)
        bounce_free(worker, operation);
    gather_one(single, gather, operation->bounce, nbytes);
    return result;
}

/* Let *gather be what is left to move of a copy, which is in memory of ours as a whole. -> 0 or, as take, < 0. */
static int gather_copy(struct worker *worker, struct operation *operation, struct iovec *single, struct gather *gather)
{
    int result = operation->bounce ? 0 : take(worker, operation, operation->nbytes);

    if (result < 0)
        return result;
    gather_one(single, gather, operation->bounce + operation->progress, operation->nbytes - operation->progress);
    return 0;
}

int bounce_gather(struct worker *worker, struct operation *operation, struct iovec *single, struct gather *gather)
{
    return operation->copy ? gather_copy(worker, operation, single, gather) : encrypt(worker, operation, single, gather);
}

int bounce_front(struct worker *worker, struct operation *operation, struct iovec *single, struct gather *gather)
{
    uint32_t nbytes = gather->nbytes < BOUNCE_NBYTES ? gather->nbytes : BOUNCE_NBYTES, done = 0;
    int result = take(worker, operation, nbytes);

    if (result < 0)
        return result;
    for (uint32_t i = 0; done < nbytes; i++) {
        uint64_t run = gather->iovecs[i].iov_len;
        if (run > nbytes - done)
            run = nbytes - done;
        memcpy(operation->bounce + done, gather->iovecs[i].iov_base, run);
        done += run;
    }
    gather_one(single, gather, operation->bounce, nbytes);
    return 0;
}

int bounce_merge(struct operation *operation)
{
    const struct request_copy *copy = operation->copy;
    const struct extent_cipher *old_cipher = copy->old_cipher, *cipher = copy->cipher;
    int result = 0;

    if (old_cipher && copy->old_slot != EXTENT_NO_SLOT)
        result = old_cipher->decrypt(old_cipher->context, (copy->old_offset - old_cipher->origin) / EXTENT_SECTOR,
                                     operation->bounce, operation->bounce, copy->nbytes);
    pieces_load(operation->request->data, operation->piece.start, operation->piece.nbytes,
                operation->bounce + copy->ahead);
    if (result == 0 && cipher)
        result = cipher->encrypt(cipher->context, (copy->host_offset - cipher->origin) / EXTENT_SECTOR,
                                 operation->bounce, operation->bounce, copy->nbytes);
    return result;
}
