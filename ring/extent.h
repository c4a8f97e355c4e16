/* The one seam between a device and an image: where are these guest bytes?
 *
 * An image that can answer without deciding anything hands the worker an extent
 * map: a function and its context. The worker calls it, on its own thread and
 * with no lock, for each piece of a read or write. The answer holds until the
 * worker next returns to Python.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

enum extent_kind {
    EXTENT_PUNT = 0, /* only Python can tell, or the range needs an allocation, a copy, an error */
    EXTENT_DATA = 1, /* the bytes at host_offset of the file in `slot` */
    EXTENT_ZERO = 2, /* reads as zeros; never given for a write */
    EXTENT_FRESH = 3, /* for a write: nothing is here, and the map may have a place for it; see below */
};

/* What stores sectors of 512 bytes encrypted: `context` goes to each call, a sector's number counts from `origin` of the
 * file. Whole sectors; `to` is `from` or does not overlap it. -> 0, or -errno. */
struct extent_cipher {
    int (*encrypt)(void *context, uint64_t sector, const uint8_t *from, uint8_t *to, size_t nbytes);
    int (*decrypt)(void *context, uint64_t sector, const uint8_t *from, uint8_t *to, size_t nbytes);
    void *context;
    uint64_t origin;
};

#define EXTENT_SECTOR 512

struct extent {
    uint32_t kind;
    uint32_t slot;        /* which of the worker's files */
    uint64_t host_offset; /* EXTENT_DATA only */
    uint64_t nbytes;      /* > 0 and <= what was asked, from guest_offset on */
    const struct extent_cipher *cipher; /* EXTENT_DATA only; NULL: the bytes are as they are */
};

/* Lets a map bring its own tables into memory while it translates. `read` fills nbytes from the worker's file `slot`
 * without waiting. -> 0: all of them; < 0: not now, so that only Python can tell. How often it does so for one request
 * is bounded, whatever the tables say. */
struct extent_reader {
    int (*read)(struct extent_reader *reader, uint32_t slot, uint64_t host_offset, void *to, uint32_t nbytes);
};

/* Describe the longest run at guest_offset, at most nbytes, that one host
 * operation can serve. For a write EXTENT_DATA promises that overwriting those
 * host bytes in place is all there is to do. reader: NULL, or good during the call. */
typedef void (*extent_translate)(void *context, uint64_t guest_offset, uint64_t nbytes, int is_write,
                                 struct extent_reader *reader, struct extent *out);

#define EXTENT_NAME_NBYTES 64
#define EXTENT_NO_SLOT UINT32_MAX
#define EXTENT_MARK_NBYTES 7

/* A place that the map has set aside for bytes which have none. */
struct extent_place {
    uint32_t slot;
    uint32_t old_slot;    /* EXTENT_NO_SLOT: the old bytes are zeros */
    uint32_t name_slot;   /* of the name, or of its mark */
    uint64_t host_offset; /* the bytes are written here, */
    uint64_t old_nbytes;  /* in the midst of so many from old_offset of old_slot on; 0: nothing is written around them */
    uint64_t old_offset;
    uint64_t ahead;       /* of old_nbytes, those that come before */
    const struct extent_cipher *cipher;     /* of what is written, old_nbytes then; NULL: the bytes are as they are */
    const struct extent_cipher *old_cipher; /* of the old bytes */
    uint8_t *memory;      /* NULL: the file; or memory that outlives the process, a SYNC then is no FLUSH */
    uint64_t name_offset; /* then, in there, this makes the place the guest's */
    uint32_t name_nbytes;
    uint8_t name[EXTENT_NAME_NBYTES];
    uint8_t mark[EXTENT_MARK_NBYTES]; /* a name in memory counts once these bytes are at mark_offset of the file */
    uint64_t mark_offset;
    uint64_t guest_offset;
    uint64_t entry[2]; /* for the map, */
    uint64_t old_entry[2]; /* as are these: what was there before, */
    uint64_t is_kept;      /* and whether the place was the guest's then */
    uint64_t after_sync;   /* hold it: it is named after a SYNC that begins once its bytes are written */
};

enum extent_outcome {
    EXTENT_UNTOUCHED, /* nothing was written to the place */
    EXTENT_SPOILED,   /* something may have been; it has no name */
    EXTENT_NAMED,     /* all was written */
};

/* Lets a map change its own tables: `write` to the worker's file `slot`, on this thread. -> 0; -EAGAIN: not now,
 * nothing was written; or how it failed. */
struct extent_writer {
    int (*write)(struct extent_writer *writer, uint32_t slot, uint64_t host_offset, const void *bytes, uint32_t nbytes);
};

enum extent_clearing {
    EXTENT_DISCARD, /* a hint: give the space back, where that is more than changing a table the bytes may stay */
    EXTENT_UNMAP,   /* zeros, and give the space back */
    EXTENT_KEEP,    /* zeros, and keep the space */
};

#define EXTENT_HELD 48 /* places that are held at a time, at most */

/* What a map offers besides for EXTENT_FRESH, and for discards and zeros; a map without it has none. `take`
 * sets a place aside; syncs: the write is to be stable, so its place may be named after a SYNC. -> 0; -EAGAIN: only
 * Python can; -EBUSY: one for these bytes is held. `conclude` says what came
 * of it; nothing else is asked of the map in between, unless the place is held. error: of the name's
 * write, else 0. -> 0, or < 0: the image takes no more writes.
 *
 * `hold` keeps a place while its bytes are on their way: until `conclude` nobody else gets one for them, and whoever
 * changes their entry waits. `find` says how it is named now: -> 0, or
 * -EAGAIN: it is not, so it has to be given up as spoiled.
 *
 * `clear` lets the range read as zeros. -> 0; -EAGAIN: nothing has changed, only Python can; else the image takes no
 * more writes. */
struct extent_places {
    int (*take)(void *context, uint64_t guest_offset, uint64_t nbytes, int syncs, struct extent_place *out);
    void (*hold)(void *context, const struct extent_place *place);
    int (*find)(void *context, struct extent_place *place);
    int (*conclude)(void *context, const struct extent_place *place, enum extent_outcome outcome, int error);
    int (*clear)(void *context, uint64_t guest_offset, uint64_t nbytes, enum extent_clearing how,
                 struct extent_writer *writer);
};

_Static_assert(sizeof(struct extent) == 32, "struct extent is shared between extensions");
