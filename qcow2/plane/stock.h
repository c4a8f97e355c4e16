/* Host clusters that are ready to be handed out, to Python and to the extent map.
 *
 * What may be in here is Python's business (`allocation`): counted, inside the
 * file, zeros, all of it stable; or stable after the next SYNC. One thread.
 */
#pragma once

#include <stdint.h>

#include "ring/extent.h"

#define STOCK_RUNS 64
#define STOCK_SPOILED (2 * EXTENT_HELD)

struct stock_run {
    uint64_t first;
    uint64_t end;
};

struct stock {
    uint64_t left;      /* clusters in the runs */
    uint64_t low;       /* with so many left the map leaves one write to Python, and forgets this */
    uint64_t linked;    /* that the map handed out for good */
    uint32_t is_open;   /* clusters may be linked: what must be stable before is */
    uint32_t front;     /* the run to take from; the others follow */
    uint32_t nruns;
    uint32_t nspoiled;
    struct stock_run runs[STOCK_RUNS];
    uint64_t spoiled[STOCK_SPOILED]; /* taken, perhaps written to, linked by nobody */
};

void stock_clear(struct stock *stock);
/* -> 0, or -ENOSPC: there is no room for another run. */
int stock_add(struct stock *stock, uint64_t first, uint64_t end);
/* Take at most `limit` clusters in one piece. -> how many, from *first on; 0: there are none. */
uint64_t stock_take(struct stock *stock, uint64_t limit, uint64_t *first);
/* The cluster that was taken last, untouched: the next to be taken again. */
void stock_put_back(struct stock *stock, uint64_t cluster);

/* Guest clusters that somebody has locked or waits for, counted: each cluster of a narrow range, each block, the
 * clusters of a slice, that a range touches. Numbers that fall into one bucket are taken for each other, which leaves a request to Python. */
#define LOCK_NARROW 32 /* clusters, or blocks: wider ranges are counted as what is larger */
#define LOCK_CLUSTERS 8192
#define LOCK_BLOCKS 1024

struct range_locks {
    uint32_t count;
    uint32_t wide;
    uint32_t clusters[LOCK_CLUSTERS]; /* of narrow ranges */
    uint32_t touched[LOCK_BLOCKS];    /* by any but wide ranges */
    uint32_t covered[LOCK_BLOCKS];    /* by ranges that are neither narrow nor wide */
};
