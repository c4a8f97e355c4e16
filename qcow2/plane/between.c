/* Files compared, and copied, a piece at a time: what was read is looked at while the core's cache has it. */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "qcow2/native.h"

#define COMPARED 4096
#define UNITS (BETWEEN_PIECE / 512)

static size_t least(uint64_t one, size_t other)
{
    return one < other ? (size_t)one : other;
}

/* Past the end of the file are zeros. 0 or -errno. */
static int fill(int fd, uint8_t *bytes, size_t nbytes, uint64_t host_offset)
{
    ssize_t count;

    while (nbytes) {
        count = pread(fd, bytes, nbytes, (off_t)host_offset);
        if (count < 0) {
            if (errno != EINTR)
                return -errno;
            continue;
        }
        if (count == 0) {
            memset(bytes, 0, nbytes);
            return 0;
        }
        bytes += count;
        nbytes -= (size_t)count;
        host_offset += (uint64_t)count;
    }
    return 0;
}

static int store(int fd, const uint8_t *bytes, size_t nbytes, uint64_t host_offset)
{
    ssize_t count;

    while (nbytes) {
        count = pwrite(fd, bytes, nbytes, (off_t)host_offset);
        if (count < 0) {
            if (errno != EINTR)
                return -errno;
            continue;
        }
        bytes += count;
        nbytes -= (size_t)count;
        host_offset += (uint64_t)count;
    }
    return 0;
}

int64_t equal_between(int one, uint64_t one_offset, int other, uint64_t other_offset, uint64_t nbytes,
                      uint8_t *scratch)
{
    uint64_t done;
    size_t count, equal;
    int error;

    for (done = 0; done < nbytes; done += count) {
        count = least(nbytes - done, BETWEEN_PIECE);
        error = fill(one, scratch, count, one_offset + done);
        if (!error)
            error = fill(other, scratch + BETWEEN_PIECE, count, other_offset + done);
        if (error)
            return error;
        equal = equal_bytes(scratch, scratch + BETWEEN_PIECE, count, COMPARED);
        if (equal < count)
            return (int64_t)(done + equal);
    }
    return (int64_t)nbytes;
}

int copy_between(int source, uint64_t source_offset, int target, uint64_t target_offset, uint64_t nbytes, size_t unit,
                 uint8_t *scratch)
{
    uint32_t bounds[UNITS + 2];
    uint64_t done;
    size_t count, nbounds, i;
    int error;

    for (done = 0; done < nbytes; done += count) {
        count = least(nbytes - done, BETWEEN_PIECE);
        error = fill(source, scratch, count, source_offset + done);
        nbounds = error ? 0 : data_runs(scratch, count, unit, bounds);
        for (i = 0; i < nbounds && !error; i += 2)
            error = store(target, scratch + bounds[i], bounds[i + 1] - bounds[i], target_offset + done + bounds[i]);
        if (error)
            return error;
    }
    return 0;
}
