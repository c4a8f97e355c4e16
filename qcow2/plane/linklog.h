/* The front of the link log (`qcow2/plane/linklog.py`): its records, and the links that the extent map has let wait. One thread. */
#pragma once

#include <stdint.h>

#include "qcow2/plane/entry.h"

#define LINK_RECORD_NBYTES 64
#define LINK_RECORDS_OFFSET 4096 /* of the first record in the log */
#define LINK_MARK_OFFSET 88      /* in the image: the upper 56 bits of the autoclear features, big-endian, */
#define LINK_MARK_NBYTES 7       /* beside the 8 that the format may give a meaning */
#define LINK_STAMP_BITS 20
#define LINK_LIMIT ((1 << LINK_STAMP_BITS) - 64) /* of sequence numbers, less a few to forget; a stamp names one record */
#define WAITING_LINKS 2048 /* Python is called when half of them are there */

struct waiting_link {
    uint64_t cluster; /* of the guest */
    uint64_t entry[2]; /* its words */
};

struct link_log {
    uint8_t *memory;   /* where the log lies; NULL: only Python appends to it */
    uint64_t capacity; /* records */
    uint64_t first;    /* the sequence number of the first live one */
    uint64_t next;     /* and of the next */
    uint64_t mark;     /* what the image's header says of this log, without the stamp */
    uint32_t nlinks;   /* that Python does not know of */
    uint32_t has_called;
    struct waiting_link links[WAITING_LINKS];
};

/* Make the record that is to be appended next. -> its offset in the log. */
uint64_t link_log_record(const struct link_log *log, uint64_t cluster, struct entry old_entry, struct entry entry,
                         uint8_t *record);

/* What the header says once the records up to `sequence` count. The stamp is never 0, which says that none does. */
void link_log_mark(const struct link_log *log, uint64_t sequence, uint8_t mark[LINK_MARK_NBYTES]);

/* Whether the map may append one: room is kept for a record of Python's that forgets. */
int link_log_has_room(const struct link_log *log);

/* Whether one link is left to Python, so that it comes by and takes over those that it does not know of. */
int link_log_calls_python(struct link_log *log);
