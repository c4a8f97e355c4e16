/* What the worker counts. Read by other threads while it does; each count by itself is exact. All start at zero.
 *
 * The one list of them: Python sees it through `native.cdef`, which includes this file.
 */
#pragma once

#include <stdint.h>

struct worker_counters {
    uint64_t requests; /* chains popped */
    uint64_t reads;
    uint64_t writes;
    uint64_t flushes;
    uint64_t discards;
    uint64_t write_zeroes;
    uint64_t other_requests; /* GET_ID, unknown and malformed */
    uint64_t read_bytes;
    uint64_t written_bytes;
    uint64_t failed_requests; /* answered with another status than OK, or without one */
    uint64_t python_requests; /* requests that entered Python */
    uint64_t python_events;   /* all events handed to Python */
    uint64_t crossings;       /* times worker_run returned to Python */
    uint64_t kicks;           /* kick notifications seen */
    uint64_t calls;           /* call notifications sent */
    uint64_t syncs;           /* fdatasyncs started */
    uint64_t sync_waiters;    /* requests and operations they served */
    uint64_t batches;         /* publications of the used ring */
    uint64_t immediate;       /* transfers done on the worker's own thread, without io_uring */
    uint64_t stalls;          /* of them, those that made it wait too long */
    uint64_t immediate_syncs; /* of the fdatasyncs, those on the worker's own thread */
    uint64_t polls;           /* rounds that looked for work instead of sleeping */
};
