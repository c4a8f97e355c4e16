#include "ring/trace.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char magic[16] = "vhost-user trace";
static const uint8_t padding[8];

static void write_out(struct trace *trace, const uint8_t *bytes, size_t nbytes)
{
    while (nbytes && !trace->error) {
        ssize_t count = write(trace->fd, bytes, nbytes);
        if (count < 0 && errno != EINTR)
            trace->error = errno;
        if (count > 0) {
            bytes += count;
            nbytes -= count;
        }
    }
}

static void flush(struct trace *trace)
{
    write_out(trace, trace->buffer, trace->used);
    trace->used = 0;
}

static void put(struct trace *trace, const void *bytes, size_t nbytes)
{
    if (nbytes > TRACE_BUFFER - trace->used)
        flush(trace);
    if (nbytes > TRACE_BUFFER) {
        write_out(trace, bytes, nbytes);
    } else if (nbytes) {
        memcpy(trace->buffer + trace->used, bytes, nbytes);
        trace->used += nbytes;
    }
    trace->nbytes += nbytes;
}

static uint32_t pad(uint32_t content_nbytes)
{
    return -content_nbytes & 7;
}

/* Room for a TRACE_FULL is kept: a reader can tell a full trace from a cut one. */
static bool fits(struct trace *trace, uint32_t content_nbytes)
{
    uint64_t nbytes = 2 * sizeof(struct trace_record) + content_nbytes + pad(content_nbytes);
    struct trace_record full = {.kind = TRACE_FULL};

    if (trace->error)
        return false;
    if (nbytes <= trace->limit - trace->nbytes)
        return true;
    put(trace, &full, sizeof(full));
    flush(trace);
    if (!trace->error)
        trace->error = EFBIG;
    return false;
}

int trace_add(struct trace *trace, struct trace_record record, const struct iovec *content, uint32_t count)
{
    uint64_t nbytes = 0;

    for (uint32_t i = 0; i < count; i++)
        nbytes += content[i].iov_len;
    record.content_nbytes = nbytes; /* one transfer or request: less than 2 GiB */
    if (!fits(trace, record.content_nbytes))
        return -trace->error;
    put(trace, &record, sizeof(record));
    for (uint32_t i = 0; i < count; i++)
        put(trace, content[i].iov_base, content[i].iov_len);
    put(trace, padding, pad(record.content_nbytes));
    return -trace->error;
}

struct trace *trace_create(int fd, uint64_t limit)
{
    struct trace *trace = malloc(sizeof(*trace));
    struct trace_record begin = {.kind = TRACE_BEGIN, .offset = TRACE_VERSION, .nbytes = sizeof(begin)};
    struct iovec content = {(void *)(uintptr_t)magic, sizeof(magic)};

    if (!trace)
        return NULL;
    trace->fd = fd;
    trace->error = 0;
    trace->limit = limit;
    trace->nbytes = trace->operation = trace->used = 0;
    trace_add(trace, begin, &content, 1);
    return trace;
}

int trace_close(struct trace *trace)
{
    int error;

    if (!trace->error)
        flush(trace);
    error = trace->error;
    free(trace);
    return -error;
}

int trace_add_bytes(struct trace *trace, const struct trace_record *record, const void *content, uint32_t nbytes)
{
    struct iovec piece = {(void *)(uintptr_t)content, nbytes};
    return trace_add(trace, *record, &piece, 1);
}

static uint64_t add_operation(struct trace *trace, struct trace_record record, const struct iovec *content,
                              uint32_t count)
{
    record.id = ++trace->operation;
    trace_add(trace, record, content, count);
    return record.id;
}

uint64_t trace_write(struct trace *trace, uint32_t slot, uint64_t host_offset, const struct iovec *iovecs,
                     uint32_t count)
{
    struct trace_record record = {.kind = TRACE_WRITE, .slot = slot, .offset = host_offset};

    for (uint32_t i = 0; i < count; i++)
        record.nbytes += iovecs[i].iov_len;
    return add_operation(trace, record, iovecs, count);
}

uint64_t trace_zero(struct trace *trace, uint32_t slot, uint64_t host_offset, uint64_t nbytes)
{
    struct trace_record record = {.kind = TRACE_ZERO, .slot = slot, .offset = host_offset, .nbytes = nbytes};
    return add_operation(trace, record, NULL, 0);
}

uint64_t trace_resize(struct trace *trace, uint32_t slot, uint64_t nbytes)
{
    struct trace_record record = {.kind = TRACE_RESIZE, .slot = slot, .nbytes = nbytes};
    return add_operation(trace, record, NULL, 0);
}

uint64_t trace_sync(struct trace *trace, uint32_t slot)
{
    return add_operation(trace, (struct trace_record){.kind = TRACE_SYNC, .slot = slot}, NULL, 0);
}

void trace_done(struct trace *trace, uint64_t id, int result)
{
    trace_add(trace, (struct trace_record){.kind = TRACE_DONE, .id = id, .result = result}, NULL, 0);
}
