/* What qcow2's C offers to its cffi wrapper; the contracts stand in the headers, `native.cdef` repeats the prototypes. */
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "qcow2/plane/clusters.h"
#include "qcow2/plane/dirtybits.h"
#include "qcow2/plane/entry.h"
#include "qcow2/plane/freed.h"
#include "qcow2/plane/l2cache.h"
#include "qcow2/plane/linklog.h"
#include "qcow2/plane/refcount.h"
#include "qcow2/plane/space.h"
#include "qcow2/plane/stock.h"
#include "qcow2/plane/tally.h"
#include "qcow2/plane/untouched.h"
#include "ring/stop.h"

/* Deallocate nbytes at host_offset without changing the file's length; 0 or -errno. */
int punch_hole(int fd, uint64_t host_offset, uint64_t nbytes);

/* Set nbytes at host_offset aside, the file growing if need be; 0 or -errno. */
int reserve_space(int fd, uint64_t host_offset, uint64_t nbytes);

/* Let the disk begin with what was written there, and wait for none of it: no promise. 0 or -errno. */
int begin_writeback(int fd, uint64_t host_offset, uint64_t nbytes);

/* Find the stretches of `bytes` that are not zeros, in units of `unit` bytes: start, end, start, end ... to `bounds`, which
 * has room for nbytes / unit + 2. How many numbers that are. */
size_t data_runs(const uint8_t *bytes, size_t nbytes, size_t unit, uint32_t *bounds);

/* How many bytes at the front are equal, in sectors of 512 bytes; `unit`, a multiple of that, is compared at a time. */
size_t equal_bytes(const uint8_t *one, const uint8_t *other, size_t nbytes, size_t unit);

/* Bytes of a file that are looked at, or copied, at a time: two of them fit into the cache of a core. */
#define BETWEEN_PIECE ((size_t)256 << 10)

/* Bytes in memory, and their place in a file. */
struct transfer {
    uint8_t *bytes;
    uint64_t nbytes;
    uint64_t host_offset;
};

/* Read, or write, one after the other. 0, or -errno of the first that fails. Past the end of a file are zeros. */
int fill_all(int fd, const struct transfer *transfers, size_t n);
int store_all(int fd, const struct transfer *transfers, size_t n);

/* Read a range of a disk if its extent map, whose slots are file descriptors, knows without a look at the disk where all
 * of it is. 1: it is read; 0: only Python can do it; -errno. `bytes` holds anything then. */
int read_at_once(uintptr_t translate, uintptr_t map, uint64_t guest_offset, uint64_t nbytes, uint8_t *bytes);

/* Stretches of two files that go together. */
struct stretch_pair {
    uint64_t one_offset;
    uint64_t other_offset;
    uint64_t nbytes;
};

/* How many bytes are equal, all pairs counted as one stretch, from the front on, in sectors of 512 bytes, or -errno of
 * reading them; `scratch` has room for two pieces. Past the end of a file are zeros. */
int64_t equal_between(int one, int other, const struct stretch_pair *pairs, size_t npairs, uint8_t *scratch);

/* Copy stretches of a file to another one but for zeros, in units of `unit` bytes, of which a piece is a multiple;
 * `scratch` has room for a piece. What was no zeros is in `bounds`, as `data_runs` says it, of one stretch behind the
 * other, and how many numbers of each in `counts`. 0, or -errno: then some of it may be there. */
int copy_between(int source, int target, const struct stretch_pair *pairs, size_t npairs, size_t unit,
                 uint8_t *scratch, uint32_t *bounds, uint32_t *counts);

/* Decompress the raw deflate stream at the front of `stream`, ignoring what follows it. 0; -ENOMEM; -EINVAL if it is
 * none, or does not end after exactly cluster_nbytes. `cluster` holds anything after an error. */
int inflate_cluster(const uint8_t *stream, size_t stream_nbytes, uint8_t *cluster, size_t cluster_nbytes);

/* Compress a cluster to a raw deflate stream of at most `limit` bytes. Its length; 0 if it does not fit; -ENOMEM. */
ssize_t deflate_cluster(const uint8_t *cluster, size_t cluster_nbytes, int level, uint8_t *stream, size_t limit);
