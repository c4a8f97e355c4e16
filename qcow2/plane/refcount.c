/* See refcount.h. Entries narrower than a byte fill it from its least significant bit; wider ones are big-endian. */
#include "qcow2/plane/refcount.h"

#include <endian.h>
#include <string.h>

uint64_t refcount_get(const uint8_t *block, uint32_t order, uint64_t index)
{
    uint64_t value = 0;
    uint32_t width = UINT32_C(1) << order;

    if (order < 3) {
        uint64_t bit = index << order;

        return (block[bit >> 3] >> (bit & 7)) & ((1u << width) - 1);
    }
    memcpy((uint8_t *)&value + 8 - width / 8, block + (index << (order - 3)), width / 8);
    return be64toh(value);
}

void refcount_set(uint8_t *block, uint32_t order, uint64_t index, uint64_t value)
{
    uint32_t width = UINT32_C(1) << order;

    if (order < 3) {
        uint64_t bit = index << order;
        uint32_t mask = ((1u << width) - 1) << (bit & 7);

        block[bit >> 3] = (uint8_t)((block[bit >> 3] & ~mask) | ((uint32_t)value << (bit & 7)));
        return;
    }
    value = htobe64(value);
    memcpy(block + (index << (order - 3)), (uint8_t *)&value + 8 - width / 8, width / 8);
}

/* The eight bytes that begin with entry `first`, as they are in memory. */
static uint64_t word_at(const uint8_t *block, uint32_t order, uint64_t first)
{
    uint64_t word;

    memcpy(&word, block + (first << order) / 8, sizeof(word));
    return word;
}

/* Nonzero if an entry of that word is zero: it alone borrows from the top bit of its lane. */
static uint64_t zeros_at(const uint8_t *block, uint32_t order, uint64_t first)
{
    uint64_t word = word_at(block, order, first);
    uint64_t lowest = UINT64_MAX / (UINT64_MAX >> (64 - (1u << order)));

    return (word - lowest) & ~word & lowest << ((1u << order) - 1);
}

uint64_t refcount_find(const uint8_t *block, uint32_t order, uint64_t first, uint64_t end, int nonzero)
{
    uint64_t per_word = 64 >> order;

    while (first < end && (refcount_get(block, order, first) != 0) != (nonzero != 0)) {
        first++;
        if (first % per_word == 0)
            while (end - first >= per_word && !(nonzero ? word_at(block, order, first) : zeros_at(block, order, first)))
                first += per_word;
    }
    return first;
}

uint64_t refcount_used(const uint8_t *block, uint32_t order, uint64_t end)
{
    uint64_t per_word = 64 >> order;

    while (end > 0 && refcount_get(block, order, end - 1) == 0) {
        end--;
        if (end % per_word == 0)
            while (end > 0 && !word_at(block, order, end - per_word))
                end -= per_word;
    }
    return end;
}

uint64_t refcount_add(uint8_t *block, uint32_t order, const uint64_t *entries, uint64_t count, int delta)
{
    uint64_t limit = UINT64_MAX >> (64 - (UINT32_C(1) << order));
    uint64_t done;

    for (done = 0; done < count; done++) {
        uint64_t value = refcount_get(block, order, entries[done]);

        if (value == (delta < 0 ? 0 : limit))
            break;
        refcount_set(block, order, entries[done], delta < 0 ? value - 1 : value + 1);
    }
    return done;
}

uint64_t refcount_zero(const uint8_t *block, uint32_t order, const uint64_t *entries, uint64_t count, uint64_t *zero)
{
    uint64_t found = 0;

    for (uint64_t i = 0; i < count; i++)
        if (!refcount_get(block, order, entries[i]))
            zero[found++] = entries[i];
    return found;
}

uint64_t refcount_last(const uint8_t *block, uint32_t order, const uint64_t *entries, uint64_t count, uint64_t *last)
{
    uint64_t found = 0;

    for (uint64_t i = 0, times; i < count; i += times) {
        for (times = 1; i + times < count && entries[i + times] == entries[i];)
            times++;
        if (refcount_get(block, order, entries[i]) == times)
            last[found++] = entries[i];
    }
    return found;
}
