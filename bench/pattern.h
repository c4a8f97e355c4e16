/* Where the next request goes. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

enum pattern_order {
    PATTERN_RANDOM,     /* any block, again and again */
    PATTERN_SEQUENTIAL, /* block after block, from the start again at the end */
    PATTERN_ONCE,       /* one block of every stride, scattered, until all strides were visited */
};

struct pattern {
    enum pattern_order order;
    uint64_t start; /* guest offset, bytes */
    uint64_t nbytes;
    uint32_t block_size;
    uint32_t stride;  /* bytes; used by PATTERN_ONCE only */
    uint64_t step;    /* strides between one visit and the next, coprime to their number */
    uint64_t visited; /* blocks or strides so far */
    uint64_t random;  /* state of the generator */
};

void pattern_init(struct pattern *pattern, enum pattern_order order, uint64_t start, uint64_t nbytes,
                  uint32_t block_size, uint32_t stride, uint64_t seed);

/* -> false when everything was visited once. */
bool pattern_next(struct pattern *pattern, uint64_t *guest_offset);

/* A pseudo-random number below `limit`. */
uint64_t pattern_random(struct pattern *pattern, uint64_t limit);
