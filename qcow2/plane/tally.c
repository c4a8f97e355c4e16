/* See tally.h. */
#include "qcow2/plane/tally.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "qcow2/plane/refcount.h"

#define PAGE_BITS 12
#define PAGE_SIZE (UINT64_C(1) << PAGE_BITS)

struct page {
    uint32_t count[PAGE_SIZE];
    uint8_t roles[PAGE_SIZE];
};

struct tally {
    uint64_t nclusters;
    uint64_t npages;
    struct page *pages[];
};

struct tally *tally_create(uint64_t nclusters)
{
    uint64_t npages = (nclusters + PAGE_SIZE - 1) >> PAGE_BITS;
    struct tally *tally = calloc(1, sizeof(*tally) + npages * sizeof(tally->pages[0]));

    if (tally) {
        tally->nclusters = nclusters;
        tally->npages = npages;
    }
    return tally;
}

void tally_destroy(struct tally *tally)
{
    for (uint64_t i = 0; i < tally->npages; i++)
        free(tally->pages[i]);
    free(tally);
}

static const struct page *page_of(const struct tally *tally, uint64_t cluster)
{
    return cluster < tally->nclusters ? tally->pages[cluster >> PAGE_BITS] : NULL;
}

static struct page *make_page(struct tally *tally, uint64_t cluster)
{
    struct page **page = &tally->pages[cluster >> PAGE_BITS];

    if (!*page)
        *page = calloc(1, sizeof(**page));
    return *page;
}

static uint32_t saturate(int64_t count)
{
    return count < 0 ? 0 : count > UINT32_MAX ? UINT32_MAX : (uint32_t)count;
}

static int add_one(struct tally *tally, uint64_t cluster, int64_t delta, uint32_t role)
{
    struct page *page = make_page(tally, cluster);
    uint64_t at = cluster & (PAGE_SIZE - 1);

    if (!page)
        return -ENOMEM;
    page->count[at] = saturate((int64_t)page->count[at] + delta);
    page->roles[at] |= (uint8_t)role;
    return 0;
}

int tally_add(struct tally *tally, uint64_t first, uint64_t n, int64_t delta, uint32_t role)
{
    if (first > tally->nclusters || n > tally->nclusters - first)
        return -ERANGE;
    for (uint64_t i = 0; i < n; i++) {
        int result = add_one(tally, first + i, delta, role);

        if (result < 0)
            return result;
    }
    return 0;
}

uint32_t tally_count(const struct tally *tally, uint64_t cluster)
{
    const struct page *page = page_of(tally, cluster);

    return page ? page->count[cluster & (PAGE_SIZE - 1)] : 0;
}

uint32_t tally_roles(const struct tally *tally, uint64_t cluster)
{
    const struct page *page = page_of(tally, cluster);

    return page ? page->roles[cluster & (PAGE_SIZE - 1)] : 0;
}

static uint64_t skip_page(uint64_t cluster)
{
    return (cluster | (PAGE_SIZE - 1)) + 1;
}

uint64_t tally_next(const struct tally *tally, uint64_t from, uint32_t roles)
{
    while (from < tally->nclusters) {
        const struct page *page = page_of(tally, from);
        uint64_t at = from & (PAGE_SIZE - 1);

        if (!page)
            from = skip_page(from);
        else if (page->count[at] && (page->roles[at] & roles))
            return from;
        else
            from++;
    }
    return tally->nclusters;
}

uint64_t tally_fits(const struct tally *tally, const uint8_t *block, uint32_t order, uint64_t first, uint64_t n)
{
    uint64_t limit = order == 6 ? UINT64_MAX : (UINT64_C(1) << (1u << order)) - 1;

    for (uint64_t i = 0; i < n; i++) {
        uint32_t count = tally_count(tally, first + i);
        uint64_t stored = refcount_get(block, order, i);

        if (count && (stored == 0 || count > limit || stored > limit - count))
            return i;
    }
    return n;
}

void tally_change(const struct tally *tally, uint8_t *block, uint32_t order, uint64_t first, uint64_t n, int sign)
{
    for (uint64_t i = 0; i < n; i++) {
        uint32_t count = tally_count(tally, first + i);

        if (count)
            refcount_set(block, order, i, refcount_get(block, order, i) + (uint64_t)((int64_t)count * sign));
    }
}

uint64_t tally_end(const struct tally *tally, uint64_t end)
{
    if (end > tally->nclusters)
        end = tally->nclusters;
    while (end > 0) {
        const struct page *page = page_of(tally, end - 1);

        if (!page)
            end = (end - 1) & ~(PAGE_SIZE - 1);
        else if (page->count[(end - 1) & (PAGE_SIZE - 1)])
            return end;
        else
            end--;
    }
    return 0;
}

uint64_t tally_find_free(const struct tally *tally, uint64_t n)
{
    uint64_t start = 0;

    for (uint64_t cluster = 0; cluster < tally->nclusters && cluster - start < n;) {
        if (!page_of(tally, cluster)) {
            cluster = skip_page(cluster);
        } else {
            uint32_t count = tally_count(tally, cluster++);

            if (count)
                start = cluster;
        }
    }
    return start;
}

uint64_t tally_overlap(const struct tally *tally, uint64_t from)
{
    for (; (from = tally_next(tally, from, TALLY_SINGLE | TALLY_L2)) < tally->nclusters; from++) {
        uint32_t roles = tally_roles(tally, from);

        if (roles & TALLY_TOO_LOW)
            continue;
        if ((roles & TALLY_SINGLE) ? tally_count(tally, from) > 1 : (roles & TALLY_DATA) != 0)
            return from;
    }
    return from;
}

/* Count a compressed cluster; 1 if somebody has to look at the entry. */
static int count_compressed(struct tally *tally, const struct tally_format *format, struct entry entry, uint32_t weight)
{
    uint32_t bits = format->entries.cluster_bits;
    struct payload payload = entry_payload(&format->entries, entry);
    uint64_t first = payload.host_offset >> bits;
    uint64_t last = (payload.host_offset + payload.nbytes - 1) >> bits;
    uint64_t last_sector = (payload.host_offset + payload.nbytes - 1) & ~UINT64_C(511); /* the stream ends in it */
    int is_bad = entry_is_copied(entry) || entry.bitmap || last_sector >= format->file_end;

    if (last >= tally->nclusters)
        return 1;
    int result = tally_add(tally, first, last - first + 1, weight, TALLY_DATA);
    return result < 0 ? result : is_bad;
}

/* Count an entry of another kind; 1 if somebody has to look at it. */
static int count_standard(struct tally *tally, const struct tally_format *format, struct entry entry, uint32_t weight,
                          uint64_t *next, struct tally_l2 *out)
{
    uint32_t bits = format->entries.cluster_bits;
    uint64_t offset = entry_host_offset(entry);
    int is_bad = entry_is_bad(&format->entries, entry) || entry_is_askew(&format->entries, entry) ||
                 offset >= format->file_end;

    if (offset == 0)
        return entry_is_bad(&format->entries, entry);
    out->allocated++;
    out->fragmented += *next && offset != *next;
    *next = offset + (UINT64_C(1) << bits);
    if (offset >> bits >= tally->nclusters)
        return 1;
    int result = add_one(tally, offset >> bits, weight, TALLY_DATA);
    return result < 0 ? result : is_bad;
}

int tally_l2(struct tally *tally, const struct tally_format *format, const uint8_t *table, uint32_t nentries,
             uint32_t weight, struct tally_l2 *out, uint32_t *bad)
{
    uint64_t next = 0;

    memset(out, 0, sizeof(*out));
    if (format->entries.is_identity) /* what they name is in another file, which has no counts */
        return 0;
    for (uint32_t i = 0; i < nentries; i++) {
        struct entry entry = entry_in_table(&format->entries, table, i);
        int result;

        if (entry_is_empty(entry))
            continue;
        if (entry_is_compressed(entry)) {
            out->allocated++;
            out->fragmented++;
            out->compressed++;
            result = count_compressed(tally, format, entry, weight);
        } else {
            result = count_standard(tally, format, entry, weight, &next, out);
        }
        if (result < 0)
            return result;
        if (result)
            bad[out->nbad++] = i;
    }
    return 0;
}

uint64_t tally_differ(struct tally *tally, const uint8_t *block, uint32_t order, uint64_t first, uint64_t from,
                      uint64_t n)
{
    while (from < n) {
        struct page *page = first + from < tally->nclusters ? tally->pages[(first + from) >> PAGE_BITS] : NULL;
        uint64_t at = (first + from) & (PAGE_SIZE - 1);
        uint64_t stored;

        if (!page && !block) {
            from = skip_page(first + from) - first;
            continue;
        }
        stored = block ? refcount_get(block, order, from) : 0;
        if (page)
            page->roles[at] = (uint8_t)((page->roles[at] & ~TALLY_STORED_ONE) | (stored == 1 ? TALLY_STORED_ONE : 0));
        if (stored != (page ? page->count[at] : 0)) {
            if (page && stored < page->count[at])
                page->roles[at] |= TALLY_TOO_LOW;
            return from;
        }
        from++;
    }
    return n;
}

void tally_sum(struct tally *tally, const uint8_t *block, uint32_t order, uint64_t first, uint64_t n, uint64_t end,
               struct tally_sums *out)
{
    memset(out, 0, sizeof(*out));
    for (uint64_t at = 0; (at = tally_differ(tally, block, order, first, at, n)) < n; at++) {
        uint64_t stored = block ? refcount_get(block, order, at) : 0;
        int is_low = stored < tally_count(tally, first + at);

        out->differing++;
        out->too_low += first + at < end && is_low;
        out->too_high += first + at < end && !is_low;
    }
}

void tally_pack(const struct tally *tally, uint8_t *block, uint32_t order, uint64_t first, uint64_t n)
{
    uint64_t limit = order == 6 ? UINT64_MAX : (UINT64_C(1) << (1u << order)) - 1;

    for (uint64_t i = 0; i < n; i++) {
        uint64_t count = tally_count(tally, first + i);

        refcount_set(block, order, i, count < limit ? count : limit);
    }
}

uint32_t tally_copied(const struct tally *tally, const struct tally_format *format, const uint8_t *table,
                      uint32_t nentries, int is_l1, int counted, uint32_t *wrong)
{
    uint32_t nwrong = 0;

    for (uint32_t i = 0; i < nentries; i++) {
        struct entry entry = is_l1 ? (struct entry){table_word(table, i), 0} : entry_in_table(&format->entries, table, i);
        uint64_t offset = entry_host_offset(entry), cluster = offset >> format->entries.cluster_bits;
        int is_one;

        if (!offset || entry_is_askew(&format->entries, entry) || (!is_l1 && entry_is_compressed(entry)))
            continue;
        if (counted && cluster >= tally->nclusters)
            continue; /* points nowhere: there is nothing to put right */
        is_one = counted ? tally_count(tally, cluster) == 1 : (tally_roles(tally, cluster) & TALLY_STORED_ONE) != 0;
        if (is_one != entry_is_copied(entry))
            wrong[nwrong++] = i;
    }
    return nwrong;
}
