#include "qcow2/plane/linklog.h"

#include <endian.h>
#include <libdeflate.h>
#include <stddef.h>
#include <string.h>

#include "ring/assertion.h"

struct record {
    uint64_t cluster;
    uint64_t old_entry[2];
    uint64_t entry[2];
    uint64_t sequence;
    uint64_t first;
    uint32_t checksum;
    uint32_t padding;
};
_Static_assert(sizeof(struct record) == LINK_RECORD_NBYTES, "RECORD in qcow2/plane/linklog.py");

uint64_t link_log_record(const struct link_log *log, uint64_t cluster, struct entry old_entry, struct entry entry,
                         uint8_t *record)
{
    struct record made = {
        .cluster = htole64(cluster),
        .old_entry = {htole64(old_entry.word), htole64(old_entry.bitmap)},
        .entry = {htole64(entry.word), htole64(entry.bitmap)},
        .sequence = htole64(log->next),
        .first = htole64(log->first),
    };

    ASSERT(log->next - log->first < log->capacity);
    made.checksum = htole32(libdeflate_crc32(0, &made, offsetof(struct record, checksum)));
    memcpy(record, &made, sizeof(made));
    return LINK_RECORDS_OFFSET + log->next % log->capacity * LINK_RECORD_NBYTES;
}

void link_log_mark(const struct link_log *log, uint64_t sequence, uint8_t mark[LINK_MARK_NBYTES])
{
    uint64_t value = log->mark | (sequence % ((UINT64_C(1) << LINK_STAMP_BITS) - 1) + 1);

    ASSERT(sequence < UINT64_C(1) << LINK_STAMP_BITS);
    for (int i = LINK_MARK_NBYTES; i--; value >>= 8)
        mark[i] = value;
}

int link_log_has_room(const struct link_log *log)
{
    return log->memory && log->nlinks < WAITING_LINKS && log->next - log->first + 2 < log->capacity &&
           log->next < LINK_LIMIT;
}

int link_log_calls_python(struct link_log *log)
{
    if (log->nlinks != WAITING_LINKS / 2 || log->has_called)
        return 0;
    log->has_called = 1;
    return 1;
}
