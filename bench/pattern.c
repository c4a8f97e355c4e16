#include "bench/pattern.h"

#define GOLDEN 0x9e3779b97f4a7c15ull /* 2^64 / golden ratio: successive multiples spread evenly */

static uint64_t scale(uint64_t fraction, uint64_t limit)
{
    return (uint64_t)(((unsigned __int128)fraction * limit) >> 64);
}

static uint64_t greatest_common_divisor(uint64_t a, uint64_t b)
{
    while (b) {
        uint64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

void pattern_init(struct pattern *pattern, enum pattern_order order, uint64_t start, uint64_t nbytes,
                  uint32_t block_size, uint32_t stride, uint64_t seed)
{
    uint64_t strides = nbytes / stride;

    *pattern = (struct pattern){
        .order = order,
        .start = start,
        .nbytes = nbytes,
        .block_size = block_size,
        .stride = stride,
        .step = scale(GOLDEN, strides) | 1,
        .random = seed,
    };
    while (greatest_common_divisor(pattern->step, strides) != 1)
        pattern->step += 2;
}

/* splitmix64 */
static uint64_t random64(struct pattern *pattern)
{
    uint64_t bits = pattern->random += GOLDEN;

    bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9ull;
    bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebull;
    return bits ^ (bits >> 31);
}

uint64_t pattern_random(struct pattern *pattern, uint64_t limit)
{
    return scale(random64(pattern), limit);
}

static bool next_once(struct pattern *pattern, uint64_t *guest_offset)
{
    uint64_t strides = pattern->nbytes / pattern->stride;
    uint64_t index;

    if (pattern->visited == strides)
        return false;
    index = (uint64_t)((unsigned __int128)pattern->visited++ * pattern->step % strides);
    *guest_offset = pattern->start + index * pattern->stride +
                    pattern_random(pattern, pattern->stride / pattern->block_size) * pattern->block_size;
    return true;
}

bool pattern_next(struct pattern *pattern, uint64_t *guest_offset)
{
    uint64_t blocks = pattern->nbytes / pattern->block_size;

    if (pattern->order == PATTERN_ONCE)
        return next_once(pattern, guest_offset);
    *guest_offset = pattern->start + pattern->block_size * (pattern->order == PATTERN_RANDOM
                                                                ? pattern_random(pattern, blocks)
                                                                : pattern->visited++ % blocks);
    return true;
}
