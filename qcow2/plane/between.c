/* Files read, compared and copied; a piece at a time where what was read is looked at: the core's cache has it then. */
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <string.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "qcow2/native.h"

#define COMPARED 4096
#define UNITS (BETWEEN_PIECE / 512)
#define MAX_EXTENTS 64
#define WORTH_RESERVING (64u << 10)

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

/* Take space for what is to be written, where the write would do so block by block, under the file's lock: on ext4.
 * Elsewhere it may cost a call over a network, or compression. Who finds no space says so when it writes. */
static void reserve(int fd, uint64_t host_offset, uint64_t nbytes)
{
    struct statfs system;

    if (nbytes >= WORTH_RESERVING && fstatfs(fd, &system) == 0 && system.f_type == EXT4_SUPER_MAGIC)
        (void)fallocate(fd, 0, (off_t)host_offset, (off_t)nbytes);
}

static int store(int fd, const uint8_t *bytes, size_t nbytes, uint64_t host_offset)
{
    ssize_t count;

    reserve(fd, host_offset, nbytes);
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

int fill_all(int fd, const struct transfer *transfers, size_t n)
{
    size_t i;
    int error = 0;

    for (i = 0; i < n && !error; i++)
        error = fill(fd, transfers[i].bytes, transfers[i].nbytes, transfers[i].host_offset);
    return error;
}

int store_all(int fd, const struct transfer *transfers, size_t n)
{
    size_t i;
    int error = 0;

    for (i = 0; i < n && !error; i++)
        error = store(fd, transfers[i].bytes, transfers[i].nbytes, transfers[i].host_offset);
    return error;
}

/* -> how many extents the range has, if each of them is zeros or lies in a file as it is; else 0. */
static size_t find_extents(extent_translate translate, void *map, uint64_t guest_offset, uint64_t nbytes,
                           struct extent *extents)
{
    uint64_t done;
    size_t n = 0;

    for (done = 0; done < nbytes; done += extents[n++].nbytes) {
        if (n == MAX_EXTENTS)
            return 0;
        translate(map, guest_offset + done, nbytes - done, 0, NULL, extents + n);
        if (extents[n].kind != EXTENT_ZERO && (extents[n].kind != EXTENT_DATA || extents[n].cipher))
            return 0;
    }
    return n;
}

int read_at_once(uintptr_t translate, uintptr_t map, uint64_t guest_offset, uint64_t nbytes, uint8_t *bytes)
{
    struct extent extents[MAX_EXTENTS];
    size_t n = find_extents((extent_translate)translate, (void *)map, guest_offset, nbytes, extents), i;
    int error;

    for (i = 0; i < n; bytes += extents[i++].nbytes) {
        if (extents[i].kind == EXTENT_ZERO) {
            memset(bytes, 0, extents[i].nbytes);
            continue;
        }
        error = fill((int)extents[i].slot, bytes, extents[i].nbytes, extents[i].host_offset);
        if (error)
            return error;
    }
    return n > 0;
}

/* How many bytes at the front of one pair are equal, or -errno. */
static int64_t equal_pair(int one, int other, const struct stretch_pair *pair, uint8_t *scratch)
{
    uint64_t done;
    size_t count, equal;
    int error;

    for (done = 0; done < pair->nbytes; done += count) {
        count = least(pair->nbytes - done, BETWEEN_PIECE);
        error = fill(one, scratch, count, pair->one_offset + done);
        if (!error)
            error = fill(other, scratch + BETWEEN_PIECE, count, pair->other_offset + done);
        if (error)
            return error;
        equal = equal_bytes(scratch, scratch + BETWEEN_PIECE, count, COMPARED);
        if (equal < count)
            return (int64_t)(done + equal);
    }
    return (int64_t)pair->nbytes;
}

int64_t equal_between(int one, int other, const struct stretch_pair *pairs, size_t npairs, uint8_t *scratch)
{
    int64_t total = 0, equal;
    size_t i;

    for (i = 0; i < npairs; i++) {
        equal = equal_pair(one, other, pairs + i, scratch);
        if (equal < 0)
            return equal;
        total += equal;
        if ((uint64_t)equal < pairs[i].nbytes)
            break;
    }
    return total;
}

/* Append the runs of a piece at `start` of its stretch, whose last one may go on. -> how many numbers there are. */
static size_t append_runs(uint32_t *bounds, size_t count, const uint32_t *found, size_t nfound, uint32_t start)
{
    size_t i = 0;

    if (count && nfound && found[0] == 0 && bounds[count - 1] == start) {
        bounds[count - 1] = start + found[1];
        i = 2;
    }
    for (; i < nfound; i++)
        bounds[count++] = start + found[i];
    return count;
}

/* Copy what is data of a piece that is in `scratch`. */
static int store_runs(int target, const uint8_t *scratch, uint64_t host_offset, const uint32_t *found, size_t nfound)
{
    size_t i;
    int error = 0;

    for (i = 0; i < nfound && !error; i += 2)
        error = store(target, scratch + found[i], found[i + 1] - found[i], host_offset + found[i]);
    return error;
}

/* -> how many numbers are in `bounds`, or -errno. */
static int64_t copy_pair(int source, int target, const struct stretch_pair *pair, size_t unit, uint8_t *scratch,
                         uint32_t *bounds)
{
    uint32_t found[UNITS + 2];
    uint64_t done;
    size_t count, nfound, nbounds = 0;
    int error;

    for (done = 0; done < pair->nbytes; done += count) {
        count = least(pair->nbytes - done, BETWEEN_PIECE);
        error = fill(source, scratch, count, pair->one_offset + done);
        nfound = error ? 0 : data_runs(scratch, count, unit, found);
        error = error ? error : store_runs(target, scratch, pair->other_offset + done, found, nfound);
        if (error)
            return error;
        nbounds = append_runs(bounds, nbounds, found, nfound, (uint32_t)done);
    }
    return (int64_t)nbounds;
}

int copy_between(int source, int target, const struct stretch_pair *pairs, size_t npairs, size_t unit,
                 uint8_t *scratch, uint32_t *bounds, uint32_t *counts)
{
    int64_t count;
    size_t i;

    for (i = 0; i < npairs; i++, bounds += count) {
        count = copy_pair(source, target, pairs + i, unit, scratch, bounds);
        if (count < 0)
            return (int)count;
        counts[i] = (uint32_t)count;
    }
    return 0;
}
