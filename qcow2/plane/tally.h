/* How often each host cluster is referenced, counted in memory while an image is checked; pages appear where needed. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "qcow2/plane/entry.h"

/* What references a cluster, and more bits the caller may add; the last two are conclusions of tally_differ. */
enum tally_role {
    TALLY_SINGLE = 1, /* a structure that exactly one thing may reference */
    TALLY_L2 = 2,
    TALLY_DATA = 4,
    TALLY_STORED_ONE = 64, /* the image counts exactly one reference */
    TALLY_TOO_LOW = 128    /* the image counts fewer than we do, which is a finding of its own */
};

/* The image a table belongs to, as far as its entries can be judged by it. */
struct tally_format {
    struct entry_format entries;
    uint64_t file_end; /* bytes; a cluster that begins at or past it is not in the file */
};

/* What one L2 table holds. */
struct tally_l2 {
    uint64_t allocated;
    uint64_t fragmented;
    uint64_t compressed;
    uint64_t nbad;
};

struct tally;

struct tally *tally_create(uint64_t nclusters); /* NULL: no memory */
void tally_destroy(struct tally *tally);

/* Change the counts of n clusters from first, all below nclusters, by delta, saturating at 0 and UINT32_MAX. */
int tally_add(struct tally *tally, uint64_t first, uint64_t n, int64_t delta, uint32_t role);
uint32_t tally_count(const struct tally *tally, uint64_t cluster);
uint32_t tally_roles(const struct tally *tally, uint64_t cluster);

/* The first cluster from `from` on with a count and (one of) roles, else nclusters. */
uint64_t tally_next(const struct tally *tally, uint64_t from, uint32_t roles);
/* Whether the refcounts in block, whose first entry counts cluster `first`, can hold what n clusters count besides, and
 * none of those is zero by now; the index of the first that cannot or is, else n. */
uint64_t tally_fits(const struct tally *tally, const uint8_t *block, uint32_t order, uint64_t first, uint64_t n);
/* Add what n clusters count to the refcounts in block, which fit; sign -1: take it away. */
void tally_change(const struct tally *tally, uint8_t *block, uint32_t order, uint64_t first, uint64_t n, int sign);
/* One past the last cluster below end that has a count. */
uint64_t tally_end(const struct tally *tally, uint64_t end);
/* The first of the earliest n consecutive clusters without a count, which may lie past nclusters. */
uint64_t tally_find_free(const struct tally *tally, uint64_t n);
/* The first cluster from `from` on whose references contradict each other though their number is right. */
uint64_t tally_overlap(const struct tally *tally, uint64_t from);

/*
 * Count what the big-endian L2 table references, each reference weight times. bad: uint32_t[nentries], filled with the
 * indexes of nbad entries that somebody has to look at; those that point outside of the tally are not counted.
 */
int tally_l2(struct tally *tally, const struct tally_format *format, const uint8_t *table, uint32_t nentries,
             uint32_t weight, struct tally_l2 *out, uint32_t *bad);

/*
 * Compare the refcounts stored in block (NULL: all zero), whose first entry counts cluster `first`, from entry `from` up
 * to n; returns the index of the first that differs, else n, and marks the clusters it passes.
 */
uint64_t tally_differ(struct tally *tally, const uint8_t *block, uint32_t order, uint64_t first, uint64_t from,
                      uint64_t n);
/* The same to the end at once: how many of the clusters below end are counted too low, and how many too high. */
struct tally_sums {
    uint64_t too_low;
    uint64_t too_high;
    uint64_t differing; /* past end too */
};
void tally_sum(struct tally *tally, const uint8_t *block, uint32_t order, uint64_t first, uint64_t n, uint64_t end,
               struct tally_sums *out);
/* Write our counts of n clusters from first into block, saturating at the width of an entry. */
void tally_pack(const struct tally *tally, uint8_t *block, uint32_t order, uint64_t first, uint64_t n);

/*
 * Find entries of an L1 (is_l1) or L2 table whose COPIED flag does not say whether the refcount is one: the stored one,
 * or with counted the one we counted. wrong: uint32_t[nentries], filled with their indexes; returns their number.
 */
uint32_t tally_copied(const struct tally *tally, const struct tally_format *format, const uint8_t *table,
                      uint32_t nentries, int is_l1, int counted, uint32_t *wrong);
