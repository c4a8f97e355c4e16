/* Pieces: a run of bytes scattered over an array of iovecs. */
#pragma once

#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

/* The next stretch of a walk over [start, start + nbytes) of the pieces. */
struct piece_walk {
    const struct iovec *piece;
    uint64_t skip;
    uint64_t left;
};

/* Begin at `start`; the caller knows that the pieces hold start + nbytes bytes. */
static inline struct piece_walk pieces_walk(const struct iovec *pieces, uint64_t start, uint64_t nbytes)
{
    struct piece_walk walk = {pieces, start, nbytes};

    while (walk.left && walk.skip >= walk.piece->iov_len)
        walk.skip -= (walk.piece++)->iov_len;
    return walk;
}

/* Take the next stretch. -> 0 at the end of the walk. */
static inline int pieces_next(struct piece_walk *walk, struct iovec *stretch)
{
    uint64_t run;

    while (walk->left && walk->skip == walk->piece->iov_len) {
        walk->piece++;
        walk->skip = 0;
    }
    if (!walk->left)
        return 0;
    run = walk->piece->iov_len - walk->skip;
    if (run > walk->left)
        run = walk->left;
    *stretch = (struct iovec){(uint8_t *)walk->piece->iov_base + walk->skip, run};
    walk->skip += run;
    walk->left -= run;
    return 1;
}

static inline void pieces_load(const struct iovec *pieces, uint64_t start, uint64_t nbytes, void *to)
{
    struct piece_walk walk = pieces_walk(pieces, start, nbytes);
    struct iovec stretch;

    for (uint8_t *next = to; pieces_next(&walk, &stretch); next += stretch.iov_len)
        memcpy(next, stretch.iov_base, stretch.iov_len);
    __asm__ volatile("" ::: "memory"); /* the copy is what gets validated, never the guest's memory again */
}

static inline void pieces_store(const struct iovec *pieces, uint64_t start, uint64_t nbytes, const void *from)
{
    struct piece_walk walk = pieces_walk(pieces, start, nbytes);
    struct iovec stretch;

    for (const uint8_t *next = from; pieces_next(&walk, &stretch); next += stretch.iov_len)
        memcpy(stretch.iov_base, next, stretch.iov_len);
}

static inline void pieces_clear(const struct iovec *pieces, uint64_t start, uint64_t nbytes)
{
    struct piece_walk walk = pieces_walk(pieces, start, nbytes);
    struct iovec stretch;

    while (pieces_next(&walk, &stretch))
        memset(stretch.iov_base, 0, stretch.iov_len);
}
