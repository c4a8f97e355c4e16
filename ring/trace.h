/* The trace of a worker: what it was asked, what it issued, and when each came to an end, in one total order.
 *
 * A file of records, each followed by its content, padded with zeros to 8
 * bytes. Numbers are the machine's, little-endian. A trace that ends within a
 * record, because its writer was killed, is good up to that record.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#define TRACE_VERSION 1
#define TRACE_BUFFER (1u << 20)

enum trace_kind {
    TRACE_BEGIN = 1, /* first: offset TRACE_VERSION, nbytes sizeof(struct trace_record), content "vhost-user trace" */
    TRACE_FILE,      /* slot is a file: nbytes long, flags TRACE_WRITABLE, content its path */
    TRACE_CONTENT,   /* of a writable file before the first request; what no record mentions is zeros */
    TRACE_REQUEST,   /* a change or FLUSH, popped: id, virtio type, offset and nbytes of the disk, content of a write */
    TRACE_ANSWER,    /* the request id, of that type, is about to be answered: result is the status */
    TRACE_WRITE,     /* operation id may reach the file from now on; its content */
    TRACE_ZERO,      /* the same, of zeros that do not change the file's length */
    TRACE_RESIZE,    /* the same, of the file's length: nbytes */
    TRACE_STORE,     /* content was put at offset of the shared memory that belongs to the writable file */
    TRACE_SYNC,      /* fdatasync id begins: it covers what was DONE before */
    TRACE_DONE,      /* operation id came to an end: result is what the kernel said */
    TRACE_FULL,      /* last, where the file was not allowed to grow further */
};

enum trace_flag {
    TRACE_WRITABLE = 1,     /* FILE: this worker may write it */
    TRACE_WRITETHROUGH = 2, /* REQUEST: answered OK it must be stable */
};

/* `TRACE_RECORD` in ring/trace.py. */
struct trace_record {
    uint32_t kind;
    int32_t result;
    uint64_t id; /* of a request: request_id(); of an operation: counted from 1 */
    uint64_t offset;
    uint64_t nbytes;
    uint32_t slot;
    uint32_t type;
    uint32_t flags;
    uint32_t content_nbytes;
};
_Static_assert(sizeof(struct trace_record) == 48, "RECORD in ring/trace.py");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "records are written as they lie in memory");

struct trace {
    int fd;
    int error; /* errno that ended it, EFBIG if it is full; nothing is recorded any more */
    uint64_t limit;
    uint64_t nbytes; /* of the file, with what is buffered */
    uint64_t operation; /* the id given last */
    size_t used;
    uint8_t buffer[TRACE_BUFFER];
};

/* Begin a trace of at most `limit` bytes in the empty file fd, which is borrowed. NULL: no memory. */
struct trace *trace_create(int fd, uint64_t limit);

/* Write out what is buffered, and free it. -> 0, or -errno of what ended the trace early. */
int trace_close(struct trace *trace);

/* Add a record; content_nbytes is filled in from the pieces. -> 0, or -errno of what ended the trace. */
int trace_add(struct trace *trace, struct trace_record record, const struct iovec *content, uint32_t count);

/* The same, for Python. */
int trace_add_bytes(struct trace *trace, const struct trace_record *record, const void *content, uint32_t nbytes);

/* What a worker does. Begin an operation -> its id, for trace_done. */
uint64_t trace_write(struct trace *trace, uint32_t slot, uint64_t host_offset, const struct iovec *iovecs,
                     uint32_t count);
uint64_t trace_zero(struct trace *trace, uint32_t slot, uint64_t host_offset, uint64_t nbytes);
uint64_t trace_resize(struct trace *trace, uint32_t slot, uint64_t nbytes);
uint64_t trace_sync(struct trace *trace, uint32_t slot);
void trace_done(struct trace *trace, uint64_t id, int result);
