/* See clusters.h. */
#include "qcow2/plane/clusters.h"

#include <stdlib.h>

#include "qcow2/plane/entry.h"

static int ascending(const void *one, const void *other)
{
    uint64_t a = *(const uint64_t *)one, b = *(const uint64_t *)other;

    return (a > b) - (a < b);
}

void clusters_sort(uint64_t *clusters, uint64_t n)
{
    uint64_t i = 1;

    while (i < n && clusters[i - 1] <= clusters[i])
        i++;
    if (i < n)
        qsort(clusters, n, sizeof(*clusters), ascending);
}

uint64_t clusters_repeated(const uint64_t *clusters, uint64_t n)
{
    for (uint64_t i = 1; i < n; i++)
        if (clusters[i - 1] == clusters[i])
            return i;
    return n;
}

uint64_t clusters_of(const uint64_t *entries, uint64_t n, uint32_t cluster_bits, uint64_t *clusters)
{
    uint64_t found = 0;

    for (uint64_t i = 0; i < n; i++)
        if (l1_entry_offset(entries[i]))
            clusters[found++] = l1_entry_offset(entries[i]) >> cluster_bits;
    return found;
}
