/* Lists of host clusters that are too long for Python's integers: an L1 table has up to four million entries. */
#pragma once

#include <stdint.h>

/* Put `clusters` in ascending order; one pass if they are. */
void clusters_sort(uint64_t *clusters, uint64_t n);
/* The index of the first of the sorted `clusters` that equals the one before it, else n. */
uint64_t clusters_repeated(const uint64_t *clusters, uint64_t n);
/* The clusters that the `entries` of an L1 or a refcount table lead to, in their order; those without an offset are left
 * out. -> how many there are; `clusters` has room for n. */
uint64_t clusters_of(const uint64_t *entries, uint64_t n, uint32_t cluster_bits, uint64_t *clusters);
