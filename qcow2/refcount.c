/* See refcount.h. Entries narrower than a byte fill it from its least significant bit; wider ones are big-endian. */
#include "qcow2/refcount.h"

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

uint64_t refcount_find(const uint8_t *block, uint32_t order, uint64_t first, uint64_t end, int nonzero)
{
    while (first < end && (refcount_get(block, order, first) != 0) != (nonzero != 0))
        first++;
    return first;
}

uint64_t refcount_used(const uint8_t *block, uint32_t order, uint64_t end)
{
    while (end > 0 && refcount_get(block, order, end - 1) == 0)
        end--;
    return end;
}
