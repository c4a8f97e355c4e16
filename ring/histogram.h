/* Latencies, counted in powers of two: bucket i holds what took less than 2^i ns and no less than half of that. */
#pragma once

#include <stdint.h>

#define HISTOGRAM_BUCKETS 40 /* the last one, 275 s and more, holds the rest */

struct histogram {
    uint64_t buckets[HISTOGRAM_BUCKETS];
    uint64_t nanoseconds; /* the sum */
};

static inline void histogram_add(struct histogram *histogram, uint64_t nanoseconds)
{
    unsigned bits = nanoseconds ? 64 - __builtin_clzll(nanoseconds) : 0;

    histogram->buckets[bits < HISTOGRAM_BUCKETS ? bits : HISTOGRAM_BUCKETS - 1]++;
    histogram->nanoseconds += nanoseconds;
}
