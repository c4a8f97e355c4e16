#include "ring/gather.h"

#include <errno.h>
#include <stddef.h>
#include <sys/uio.h>

#include "ring/pieces.h"

#define ZEROS_NBYTES 65536
#define SUBMISSION_NBYTES (1u << 30) /* a result is an int */

static const uint8_t zeros[ZEROS_NBYTES] __attribute__((aligned(4096)));

static bool add(struct gather *gather, void *address, uint64_t nbytes)
{
    uint64_t room = SUBMISSION_NBYTES - gather->nbytes;
    uint64_t run = nbytes < room ? nbytes : room;

    if (gather->count == gather->limit || run == 0)
        return false;
    if (gather->iovecs)
        gather->iovecs[gather->count] = (struct iovec){address, run};
    gather->count++;
    gather->nbytes += run;
    return run == nbytes;
}

static bool add_zeros(struct gather *gather, uint64_t nbytes)
{
    while (nbytes) {
        uint64_t run = nbytes < ZEROS_NBYTES ? nbytes : ZEROS_NBYTES;
        if (!add(gather, (void *)(uintptr_t)zeros, run))
            return false;
        nbytes -= run;
    }
    return true;
}

static bool add_guest(struct gather *gather, const struct request *request, uint64_t start, uint64_t nbytes)
{
    struct piece_walk walk = pieces_walk(request->data, start, nbytes);
    struct iovec stretch;

    while (pieces_next(&walk, &stretch))
        if (!add(gather, stretch.iov_base, stretch.iov_len))
            return false;
    return true;
}

/* Collect what comes next. -ESTALE: a request was finished under its own transfer. */
static int gather_pieces(struct worker *worker, const struct operation *operation, struct gather *gather)
{
    uint64_t skip = operation->progress;

    for (uint32_t i = 0; i < operation->piece_count; i++) {
        const struct piece *piece = &operation->pieces[i];
        uint64_t nbytes = piece->nbytes - skip, start = piece->start + skip;
        bool whole;

        if (skip >= piece->nbytes) {
            skip -= piece->nbytes;
            continue;
        }
        skip = 0;
        if (piece->source == PIECE_HOST) {
            whole = add(gather, (void *)(uintptr_t)start, nbytes);
        } else if (piece->source == PIECE_ZEROS) {
            whole = add_zeros(gather, nbytes);
        } else {
            struct request *request = worker_request(worker, piece->source);
            if (!request)
                return -ESTALE;
            whole = add_guest(gather, request, start, nbytes);
        }
        if (!whole)
            break;
    }
    return 0;
}

int gather_submission(struct worker *worker, const struct operation *operation, struct iovec *single,
                             struct gather *gather)
{
    struct gather count = {.limit = UIO_MAXIOV};
    int result;

    *gather = (struct gather){.iovecs = single, .limit = 1};
    result = gather_pieces(worker, operation, gather);
    if (result < 0 || gather->nbytes == operation->nbytes - operation->progress)
        return result;
    gather_pieces(worker, operation, &count);
    *gather = (struct gather){.iovecs = uring_iovecs(&worker->uring, count.count), .limit = UIO_MAXIOV};
    return gather->iovecs ? gather_pieces(worker, operation, gather) : -EAGAIN;
}

bool gather_has_lost(struct worker *worker, const struct operation *operation)
{
    bool has_lost = false;

    for (uint32_t i = 0; operation->verb == VERB_WRITE && i < operation->piece_count && !has_lost; i++) {
        const struct piece *piece = &operation->pieces[i];
        bool is_ours = piece->source == PIECE_HOST || piece->source == PIECE_ZEROS;
        struct request *request = is_ours ? NULL : worker_request(worker, piece->source);

        has_lost = request && pieces_have_lost(worker, request->data, piece->start, piece->nbytes);
    }
    return has_lost;
}

bool gather_is_aligned(const struct gather *gather, const struct file *file, uint64_t host_offset)
{
    if ((host_offset | gather->nbytes) & (file->offset_align - 1))
        return false;
    for (uint32_t i = 0; i < gather->count; i++)
        if (((uintptr_t)gather->iovecs[i].iov_base & (file->memory_align - 1)) ||
            (gather->iovecs[i].iov_len & (file->offset_align - 1)))
            return false;
    return true;
}

void gather_zero_rest(struct worker *worker, const struct operation *operation)
{
    uint64_t skip = operation->progress;

    for (uint32_t i = 0; i < operation->piece_count; i++) {
        const struct piece *piece = &operation->pieces[i];
        struct request *request;

        if (skip >= piece->nbytes) {
            skip -= piece->nbytes;
            continue;
        }
        if (piece->source == PIECE_HOST)
            memset((uint8_t *)(uintptr_t)piece->start + skip, 0, piece->nbytes - skip);
        else if ((request = worker_request(worker, piece->source)))
            pieces_clear(request->data, piece->start + skip, piece->nbytes - skip);
        skip = 0;
    }
}
