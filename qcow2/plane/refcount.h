/* Refcount entries of 1 to 64 bits, packed as in a refcount block of the file. */
#pragma once

#include <stddef.h>
#include <stdint.h>

/* block: a refcount block as in the file; order: log2 of an entry's width in bits; first, end, index: entries of it. */
uint64_t refcount_get(const uint8_t *block, uint32_t order, uint64_t index);
void refcount_set(uint8_t *block, uint32_t order, uint64_t index, uint64_t value);
/* The first entry in [first, end) that is zero (or, with nonzero, is not), else end. */
uint64_t refcount_find(const uint8_t *block, uint32_t order, uint64_t first, uint64_t end, int nonzero);
/* One past the last entry in [0, end) that is not zero; 0 if all are zero. */
uint64_t refcount_used(const uint8_t *block, uint32_t order, uint64_t end);
/* Add delta, 1 or -1, to entries[0] to entries[count - 1], in this order. -> count, or the index of the first that would
 * leave its bounds: those before it are changed then. */
uint64_t refcount_add(uint8_t *block, uint32_t order, const uint64_t *entries, uint64_t count, int delta);
/* Which of `entries`, in ascending order, are named as often as they count. -> the number of those put into `last`. */
uint64_t refcount_last(const uint8_t *block, uint32_t order, const uint64_t *entries, uint64_t count, uint64_t *last);
/* Which of `entries` count zero. -> the number of those put into `zero`. */
uint64_t refcount_zero(const uint8_t *block, uint32_t order, const uint64_t *entries, uint64_t count, uint64_t *zero);
