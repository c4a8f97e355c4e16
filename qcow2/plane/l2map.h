/* The inside of a struct l2map, between the files that work on one. */
#pragma once

#include "qcow2/plane/dirtybits.h"
#include "qcow2/plane/freed.h"
#include "qcow2/plane/l2cache.h"
#include "qcow2/plane/linklog.h"
#include "qcow2/plane/stock.h"
#include "qcow2/plane/untouched.h"

#define MAX_SLICE_BITS 9 /* 512 words, 4 KiB */
#define CLAIMS 4096 /* a power of two */
#define NONE UINT32_MAX

struct l2map {
    struct entry_format format;
    uint32_t cluster_bits;
    uint32_t slice_bits; /* log2 of the entries in a slice */
    uint32_t table_bits; /* log2 of the entries in a table */
    uint64_t size;

    const uint64_t *l1;
    uint64_t l1_nentries;
    const uint64_t *metadata;
    size_t nmetadata;
    uint64_t file_end;

    uint32_t slot;
    uint32_t data_slot; /* of the file that data lies in: the same, but where is_identity */
    const struct extent_cipher *cipher; /* of the data; NULL: it is as it is */
    int writable;
    int error; /* errno of a write of an entry, or of the log's mark, that failed */
    int has_backing;
    extent_translate backing_translate;
    void *backing_context;
    uint64_t backing_size;

    struct stock *stock;    /* NULL: only Python allocates */
    struct stock *unsynced; /* clusters for links that wait in the log */
    struct link_log *log;   /* NULL: none may */
    int is_logless;         /* nor ever will; links over what shows through are made after a SYNC */
    struct freed *freed;    /* NULL: only Python frees clusters */
    struct untouched *untouched; /* of a data file; NULL: its entries are Python's */
    struct dirty_bits *dirty; /* NULL: no bitmap records */
    struct range_locks locks;
    uint64_t held[EXTENT_HELD]; /* guest clusters of places that are held */
    uint32_t nheld;
    uint64_t loads;          /* slices that translate has loaded */
    uint64_t clears;         /* writes of entries */
    uint32_t claims[CLAIMS]; /* of Python's on slices, by their last bits: one too many only costs time */

    uint32_t nslots;
    uint32_t nused;
    uint32_t hand;
    uint32_t bucket_mask;
    uint64_t *words;     /* nslots slices, host byte order */
    uint64_t *slice_of;  /* slot -> slice number */
    uint32_t *next;      /* slot -> next slot of the same bucket */
    uint32_t *buckets;   /* bucket -> first slot */
    uint8_t *referenced; /* slot -> used since the hand last passed */
};

static inline size_t slice_nwords(const struct l2map *map)
{
    return (size_t)1 << (map->slice_bits + map->format.word_bits);
}

static inline uint64_t *slice_words(struct l2map *map, uint32_t slot)
{
    return map->words + slot * slice_nwords(map);
}

static inline uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* -> where the slice is, or NONE. */
uint32_t l2map_find(struct l2map *map, uint64_t slice);
/* Nobody knows what an entry, or the log's mark, is since writing it has failed: write none from now on. -> result. */
int l2map_fail(struct l2map *map, int result);
/* -> whether somebody has locked one of the guest clusters from first to last. */
int l2map_is_locked(const struct l2map *map, uint64_t first, uint64_t last);
/* -> host offset of the L2 table of the guest cluster; 0: there is none, or its L1 entry cannot be true. */
uint64_t l2map_table(const struct l2map *map, uint64_t cluster);
/* The same for a table that no snapshot shares. */
uint64_t l2map_private_table(const struct l2map *map, uint64_t cluster);
/* Note in every bitmap that records that these bytes change. -> 0; -EAGAIN: only Python can see to it. */
int l2map_mark(struct l2map *map, uint64_t guest_offset, uint64_t nbytes);
/* Bytes from the start of its table to the entry of the guest cluster. */
uint64_t l2map_in_table(const struct l2map *map, uint64_t cluster);
/* Whether the slice's entries, or some, are Python's: in the file is not what is in memory, or it is being read. */
int l2map_is_claimed(const struct l2map *map, uint64_t slice);
/* `clear` of struct extent_places, in clear.c. */
int l2map_clear(void *map, uint64_t guest_offset, uint64_t nbytes, enum extent_clearing how,
                struct extent_writer *writer);
/* What shows through where nothing is allocated. */
void l2map_translate_backing(const struct l2map *map, uint64_t guest_offset, uint64_t nbytes,
                             struct extent_reader *reader, struct extent *out);
