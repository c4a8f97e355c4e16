/* The one decoder of what L1 and L2 tables hold: nobody else knows a bit of an entry. `entry.py` is its face.
 *
 * An entry of an L2 table is one word, or with subclusters two, the second of which says for each of 32 what it is.
 * A struct entry holds both; without subclusters its bitmap is 0. In memory words are in host byte order.
 */
#pragma once

#include <endian.h>
#include <stdint.h>
#include <string.h>

#define ENTRY_OFFSET UINT64_C(0x00fffffffffffe00)
#define ENTRY_COPIED (UINT64_C(1) << 63)
#define ENTRY_COMPRESSED (UINT64_C(1) << 62)
#define ENTRY_ZERO UINT64_C(1)                        /* without subclusters; with them the bit means nothing */
#define ENTRY_RESERVED UINT64_C(0x3f000000000001fe)   /* of a standard L2 entry */
#define L1_ENTRY_RESERVED UINT64_C(0x7f000000000001ff)
#define ENTRY_SUBCLUSTER_BITS 5 /* log2 of the subclusters of a cluster */
#define ENTRY_SUBCLUSTERS UINT32_C(32)

/* The image that entries are of, as far as it says what they mean. */
struct entry_format {
    uint32_t cluster_bits;
    uint32_t version;
    uint32_t subcluster_bits; /* log2 of the bytes; cluster_bits where a cluster has none */
    uint32_t word_bits;       /* log2 of the words of an L2 entry */
    uint32_t is_identity;     /* data is in a file of its own, each cluster where it would be in a raw disk */
};

struct entry {
    uint64_t word;
    uint64_t bitmap; /* bit i: subcluster i is data; bit 32 + i: it reads as zeros */
};

enum l2_kind {
    L2_MISS = 0,           /* the slice is not in memory */
    L2_UNALLOCATED = 1,    /* nothing here: the backing file, or zeros; a host cluster may be kept at host_offset, else 0 */
    L2_ZERO_PLAIN = 2,     /* reads as zeros, owns no host cluster */
    L2_ZERO_ALLOCATED = 3, /* reads as zeros, keeps the host cluster at host_offset */
    L2_DATA = 4,
    L2_COMPRESSED = 5,
    L2_BAD = 6, /* the entry contradicts the image; host_offset is what it names */
};

/* What a stretch of guest bytes has in common. */
struct l2_run {
    uint32_t kind;
    uint32_t copied;      /* the COPIED flag: refcount exactly one */
    struct entry entry;   /* the first one as it stands in the table */
    uint64_t host_offset; /* of the first guest byte; of the cluster or payload if compressed or bad */
    uint64_t nbytes;
};

/* Where the stream of a compressed cluster may lie. */
struct payload {
    uint64_t host_offset;
    uint64_t nbytes;
};

static inline uint32_t entry_format_bits(const struct entry_format *format) /* log2 of the bytes of an entry */
{
    return 3 + format->word_bits;
}

static inline uint32_t entry_subclusters(const struct entry_format *format)
{
    return UINT32_C(1) << (format->cluster_bits - format->subcluster_bits);
}

static inline uint64_t table_word(const uint8_t *table, uint64_t index)
{
    uint64_t word;

    memcpy(&word, table + sizeof(word) * index, sizeof(word));
    return be64toh(word);
}

/* Entry number `index` of a table as it is in the file. */
static inline struct entry entry_in_table(const struct entry_format *format, const uint8_t *table, uint64_t index)
{
    uint64_t at = index << format->word_bits;

    return (struct entry){table_word(table, at), format->word_bits ? table_word(table, at + 1) : 0};
}

/* Entry number `index` of words in memory. */
static inline struct entry entry_of(const struct entry_format *format, const uint64_t *words, uint64_t index)
{
    words += index << format->word_bits;
    return (struct entry){words[0], format->word_bits ? words[1] : 0};
}

static inline void entry_put(const struct entry_format *format, uint64_t *words, uint64_t index, struct entry entry)
{
    words += index << format->word_bits;
    words[0] = entry.word;
    if (format->word_bits)
        words[1] = entry.bitmap;
}

static inline int entry_is_same(struct entry one, struct entry other)
{
    return one.word == other.word && one.bitmap == other.bitmap;
}

static inline int entry_is_empty(struct entry entry)
{
    return !(entry.word | entry.bitmap);
}

static inline int entry_is_compressed(struct entry entry)
{
    return (entry.word & ENTRY_COMPRESSED) != 0;
}

/* -> 0 if it names none; not of a compressed one. */
static inline uint64_t entry_host_offset(struct entry entry)
{
    return entry.word & ENTRY_OFFSET;
}

static inline int entry_is_copied(struct entry entry)
{
    return (entry.word & ENTRY_COPIED) != 0;
}

static inline uint32_t entry_data_bits(struct entry entry)
{
    return (uint32_t)entry.bitmap;
}

static inline uint32_t entry_zero_bits(struct entry entry)
{
    return (uint32_t)(entry.bitmap >> 32);
}

static inline struct payload entry_payload(const struct entry_format *format, struct entry entry)
{
    uint32_t offset_bits = 62 - (format->cluster_bits - 8);
    uint64_t offset = entry.word & ((UINT64_C(1) << offset_bits) - 1);
    uint64_t nsectors = ((entry.word & (ENTRY_COMPRESSED - 1)) >> offset_bits) + 1;

    return (struct payload){offset, nsectors * 512 - (offset & 511)};
}

/* Whether a standard entry names a host cluster; in a file of its own the first one is at 0. */
static inline int entry_has_cluster(const struct entry_format *format, struct entry entry)
{
    return entry_host_offset(entry) || (format->is_identity && entry_is_copied(entry));
}

/* Whether no image may hold such a standard entry, wherever the file ends. */
static inline int entry_is_bad(const struct entry_format *format, struct entry entry)
{
    if (entry.word & ENTRY_RESERVED)
        return 1;
    if (!format->word_bits)
        return format->version < 3 && (entry.word & ENTRY_ZERO);
    return (entry_data_bits(entry) & entry_zero_bits(entry)) != 0 ||
           (entry_data_bits(entry) && !entry_has_cluster(format, entry));
}

/* Whether the host cluster that a standard entry names lies askew. */
static inline int entry_is_askew(const struct entry_format *format, struct entry entry)
{
    return (entry_host_offset(entry) & ((UINT64_C(1) << format->cluster_bits) - 1)) != 0;
}

/* What a standard entry says of one of its subclusters. */
static inline enum l2_kind entry_kind(const struct entry_format *format, struct entry entry, uint32_t subcluster)
{
    int is_kept = entry_has_cluster(format, entry);

    if (!format->word_bits) {
        if (entry.word & ENTRY_ZERO)
            return is_kept ? L2_ZERO_ALLOCATED : L2_ZERO_PLAIN;
        return is_kept ? L2_DATA : L2_UNALLOCATED;
    }
    if (entry_data_bits(entry) >> subcluster & 1)
        return L2_DATA;
    if (entry_zero_bits(entry) >> subcluster & 1)
        return is_kept ? L2_ZERO_ALLOCATED : L2_ZERO_PLAIN;
    return L2_UNALLOCATED;
}

/* How many subclusters of the entry, from `first` on, are of one kind. */
static inline uint32_t entry_same_kind(const struct entry_format *format, struct entry entry, uint32_t first)
{
    uint32_t data, zero, other;

    if (!format->word_bits)
        return 1;
    if (entry_is_compressed(entry))
        return ENTRY_SUBCLUSTERS - first;
    data = entry_data_bits(entry) >> first;
    zero = entry_zero_bits(entry) >> first;
    other = (data ^ (data & 1 ? UINT32_MAX : 0)) | (zero ^ (zero & 1 ? UINT32_MAX : 0));
    other &= UINT32_MAX >> first;
    return other ? (uint32_t)__builtin_ctz(other) : ENTRY_SUBCLUSTERS - first;
}

/* The subclusters from first to last as bits of the bitmap's lower half. */
static inline uint64_t entry_mask(uint32_t first, uint32_t last)
{
    return (UINT64_C(2) << last) - (UINT64_C(1) << first);
}

/* A cluster of data that is the guest cluster's alone. */
static inline struct entry entry_data(const struct entry_format *format, uint64_t host_offset)
{
    return (struct entry){host_offset | ENTRY_COPIED, format->word_bits ? UINT32_MAX : 0};
}

/* Zeros without a host cluster; version 2 says so by an empty entry. */
static inline struct entry entry_zeros(const struct entry_format *format)
{
    if (format->word_bits)
        return (struct entry){0, (uint64_t)UINT32_MAX << 32};
    return (struct entry){format->version >= 3 ? ENTRY_ZERO : 0, 0};
}

/* The same host cluster, if there is one, and zeros in its subclusters from first to last. */
static inline struct entry entry_zeroed(const struct entry_format *format, struct entry entry, uint32_t first,
                                        uint32_t last)
{
    if (!format->word_bits)
        return (struct entry){entry.word | ENTRY_ZERO, 0};
    entry.bitmap = (entry.bitmap & ~entry_mask(first, last)) | entry_mask(first, last) << 32;
    entry.word &= ~ENTRY_ZERO;
    return entry;
}

/* The host cluster at host_offset, its guest cluster's alone, with data in the subclusters from first to last; in the
 * others is what the entry says. */
static inline struct entry entry_written(const struct entry_format *format, struct entry entry, uint64_t host_offset,
                                         uint32_t first, uint32_t last)
{
    if (!format->word_bits)
        return entry_data(format, host_offset);
    entry.word = host_offset | ENTRY_COPIED;
    entry.bitmap = (entry.bitmap & ~(entry_mask(first, last) << 32)) | entry_mask(first, last);
    return entry;
}

/* An entry with subclusters, none of them data, without its host cluster. */
static inline struct entry entry_without_cluster(struct entry entry)
{
    entry.word = 0;
    return entry;
}

/* ---- L1 ---- */

static inline uint64_t l1_entry_offset(uint64_t entry)
{
    return entry & ENTRY_OFFSET;
}

/* Whether a table can be there: no reserved bits, aligned. */
static inline int l1_entry_is_sound(const struct entry_format *format, uint64_t entry)
{
    return !(entry & L1_ENTRY_RESERVED) && !(l1_entry_offset(entry) & ((UINT64_C(1) << format->cluster_bits) - 1));
}

static inline int l1_entry_is_private(uint64_t entry)
{
    return (entry & ENTRY_COPIED) && l1_entry_offset(entry);
}
