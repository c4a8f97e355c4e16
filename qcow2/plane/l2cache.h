/* The active image's mapping as far as it is in memory: the L1 table, the L2
 * slices held in a bounded cache, and the extent map that answers from them.
 *
 * Nothing here is ever dirty: an entry changes here after it changed in the
 * file. Nothing here does I/O: what is not in memory is a miss, or a punt if
 * the worker cannot read it at once. One thread.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "qcow2/plane/entry.h"
#include "ring/extent.h"

#define SLOT_UNKNOWN UINT32_MAX

struct l2map;
struct stock;
struct freed;
struct link_log;
struct dirty_bits;
struct untouched;

/* A map of an image of `size` guest bytes; slices of min(cluster, 4 KiB), nslots of them at most; NULL if memory lacks. */
struct l2map *l2map_create(const struct entry_format *format, uint64_t size, uint32_t nslots);
void l2map_destroy(struct l2map *map);
/* The disk has `size` guest bytes now; nslots slices, or as many as before if memory lacks; none of them is there. */
int l2map_resize(struct l2map *map, uint64_t size, uint32_t nslots);

/* l1: entries in host byte order, borrowed until the next call. */
void l2map_set_l1(struct l2map *map, const uint64_t *l1, uint64_t nentries);
/* Clusters of the image's own metadata, which no guest data may overlap: sorted numbers, borrowed until the next call. */
void l2map_set_metadata(struct l2map *map, const uint64_t *clusters, size_t nclusters);
/* Host clusters at or past this byte do not exist. */
void l2map_set_file_end(struct l2map *map, uint64_t file_end);
/* The worker's number of the image's file; writable: overwrites in place may be answered. */
void l2map_set_file(struct l2map *map, uint32_t slot, int writable);
/* The worker's number of the file that data lies in, where that is another one. */
void l2map_set_data_file(struct l2map *map, uint32_t slot);
/* Why the map has stopped to write entries, and marks of the log, itself: errno, 0 while none has failed. */
int l2map_error(const struct l2map *map);
/* What shows where nothing is allocated; has_backing with translate NULL: only Python can tell. */
void l2map_set_backing(struct l2map *map, int has_backing, extent_translate translate, void *context, uint64_t size);

/* Whether an entry can say zeros: version 2 has no flag for it, and no entry lets the backing file show. */
int l2map_can_say_zeros(const struct l2map *map);

/* The image's data is stored by this cipher, which is borrowed; NULL: it is as it is. */
void l2map_set_cipher(struct l2map *map, const struct extent_cipher *cipher);

/* Let the map's places come from the stock, which is borrowed; NULL: it has none. */
void l2map_set_stock(struct l2map *map, struct stock *stock, struct stock *unsynced);
/* Let the map leave the host clusters of entries that it clears there; borrowed. */
void l2map_set_freed(struct l2map *map, struct freed *freed);
/* Let the map write to clusters of the data file that are untouched, which is borrowed; NULL: the file is raw, no entry
 * is the map's to change. */
void l2map_set_untouched(struct l2map *map, struct untouched *untouched);
/* Links over what the backing file shows may wait in this log; borrowed. */
void l2map_set_log(struct l2map *map, struct link_log *log);
/* No link waits there: each is made after a SYNC of its own. */
void l2map_set_logless(struct l2map *map, int is_logless);
/* Let the map note what changes there, before it changes; borrowed. NULL: no bitmap records. */
void l2map_set_dirty(struct l2map *map, struct dirty_bits *dirty);
/* Python holds, or waits for, the guest clusters from first to last: their entries are its to change. */
void l2map_lock(struct l2map *map, uint64_t first, uint64_t last);
void l2map_unlock(struct l2map *map, uint64_t first, uint64_t last);
/* Whether the map holds a place of one of them, whose bytes or name are on their way. */
int l2map_holds(const struct l2map *map, uint64_t first, uint64_t last);

/* Only Python may load the slice, until it takes back the claim, one of perhaps several: a link in it waits that the
 * file does not have, or what the file had is on its way to l2map_load. */
void l2map_claim(struct l2map *map, uint64_t slice);
void l2map_unclaim(struct l2map *map, uint64_t slice);
/* How many slices translate has loaded. */
uint64_t l2map_loads(const struct l2map *map);
/* How often clear has written entries. */
uint64_t l2map_clears(const struct l2map *map);

/* Put a slice in the cache: `data` as in the file; NULL: without entries, and not used yet. Evicts another one if need be. */
void l2map_load(struct l2map *map, uint64_t slice, const uint8_t *data);
/* Find slices, at most `limit`, that were used since they were loaded; once the cache is full, lately. -> how many. */
uint32_t l2map_used(const struct l2map *map, uint64_t *slices, uint32_t limit);
/* n entries from guest_offset on are now those of `words`; ignored if the slice is not in the cache. They lie in one. */
void l2map_update(struct l2map *map, uint64_t guest_offset, const uint64_t *words, size_t n);
/* The entry of the guest cluster, whose slice is in the cache. */
struct entry l2map_entry(struct l2map *map, uint64_t cluster);
/* Describe the longest run at guest_offset, at most nbytes, that lies in one slice and is of one kind. */
void l2map_describe(struct l2map *map, uint64_t guest_offset, uint64_t nbytes, struct l2_run *out);
/* extent_translate over a struct l2map, in translate.c. */
void l2map_translate(void *map, uint64_t guest_offset, uint64_t nbytes, int is_write, struct extent_reader *reader,
                     struct extent *out);
uintptr_t l2map_translate_address(void);
/* struct extent_places over a struct l2map, in fresh.c and clear.c. */
uintptr_t l2map_places_address(void);

/* A file that is its own mapping, but for what is before the disk: extent_translate over it. */
struct rawmap {
    uint64_t size;
    uint32_t slot;
    int writable;
    uint64_t start;                     /* of the disk in the file */
    const struct extent_cipher *cipher; /* of the data; NULL: it is as it is */
};
void rawmap_translate(void *map, uint64_t guest_offset, uint64_t nbytes, int is_write, struct extent_reader *reader,
                      struct extent *out);
uintptr_t rawmap_translate_address(void);
