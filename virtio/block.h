/* The C half of a virtio-blk device: requests are parsed, validated, and served
 * over the extent map where that takes no decision. Spec: virtio 1.2, 5.2.6.
 *
 * A malformed request is answered, never dropped: with a status if its chain
 * has room for one, with a used element of length 0 if not.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "ring/extent.h"
#include "ring/device.h"
#include "virtio/place.h"

#define BLOCK_SERIAL_NBYTES 20 /* VIRTIO_BLK_ID_BYTES */
#define BLOCK_NO_SLOT UINT32_MAX
#define BLOCK_FROZEN_BITS 16 /* log2 of the bytes of a chunk */

struct block {
    struct device device; /* first: the worker knows only this */
    uint64_t size;        /* bytes */
    uint32_t block_size;
    uint32_t max_range_sectors; /* of a DISCARD or WRITE_ZEROES; 0: there are none */
    uint32_t sync_slot;                /* the file that FLUSH syncs; BLOCK_NO_SLOT: Python flushes */
    uint32_t names_slot; /* the one that it syncs then, if it is not stable; BLOCK_NO_SLOT: all is in one file */
    bool read_only;
    bool writethrough;
    bool flush_punts;                 /* an fdatasync alone would not make all that completed stable: ask Python */
    bool changes_punt;                /* every write, discard and write-zeroes goes to Python */
    bool failed;                      /* every change and FLUSH is answered with IOERR */
    char serial[BLOCK_SERIAL_NBYTES]; /* the rest is NUL */
    extent_translate translate;       /* NULL: every read and write goes to Python */
    void *context;
    const struct extent_places *places; /* NULL: what has no place yet goes to Python */
    const uint8_t *frozen; /* bit n % 8 of byte n / 8: chunk n is still wanted as it is, Python alone may change it */
    uint64_t nfrozen;      /* chunks, a multiple of 8; 0: none is */
    struct request *flushing;           /* that Python is told to flush for, */
    uint64_t flushing_since;            /* the worker's round then: others may follow within it */
    struct flights flights;
    struct line waiting; /* writes that meet a place that is held, or cannot hold another one */
    uint32_t nwaiting;
    bool waking; /* they are begun anew */
    bool holds_commits;
    struct line held; /* whom a sync would serve, which begins later */
};

void block_init(struct block *block);
void block_set_extent_map(struct block *block, uintptr_t translate_address, uintptr_t context_address,
                          uintptr_t places_address);

/* Begin no sync for a FLUSH, nor for a write that wants one, until they are told to begin: requests of the guest that
 * somebody who awaits all others does not wait for. */
void block_hold_commits(struct block *block);
void block_begin_commits(struct block *block, struct worker *worker);
