/* Latencies, counted in buckets whose width is at most a 32nd of their value. */
#pragma once

#include <stdint.h>

#define HISTOGRAM_STEPS 32    /* buckets an octave */
#define HISTOGRAM_BUCKETS 1920 /* enough for every 64-bit value: values below 32 have a bucket each */

struct histogram {
    uint64_t counts[HISTOGRAM_BUCKETS];
};

static inline uint32_t histogram_index(uint64_t value)
{
    uint32_t octave;

    if (value < HISTOGRAM_STEPS)
        return (uint32_t)value;
    octave = 63 - (uint32_t)__builtin_clzll(value) - 5;
    return (octave + 1) * HISTOGRAM_STEPS + ((value >> octave) & (HISTOGRAM_STEPS - 1));
}

static inline void histogram_add(struct histogram *histogram, uint64_t value)
{
    histogram->counts[histogram_index(value)]++;
}
