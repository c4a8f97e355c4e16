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

/* Deallocate nbytes at host_offset without changing the file's length; 0 or -errno. */
int punch_hole(int fd, uint64_t host_offset, uint64_t nbytes);

/* Set nbytes at host_offset aside, the file growing if need be; 0 or -errno. */
int reserve_space(int fd, uint64_t host_offset, uint64_t nbytes);

/* Find the stretches of `bytes` that are not zeros, in units of `unit` bytes: start, end, start, end ... to `bounds`, which
 * has room for nbytes / unit + 2. How many numbers that are. */
size_t data_runs(const uint8_t *bytes, size_t nbytes, size_t unit, uint32_t *bounds);

/* How many bytes at the front are equal, in sectors of 512 bytes; `unit`, a multiple of that, is compared at a time. */
size_t equal_bytes(const uint8_t *one, const uint8_t *other, size_t nbytes, size_t unit);

/* Decompress the raw deflate stream at the front of `stream`, ignoring what follows it. 0; -ENOMEM; -EINVAL if it is
 * none, or does not end after exactly cluster_nbytes. `cluster` holds anything after an error. */
int inflate_cluster(const uint8_t *stream, size_t stream_nbytes, uint8_t *cluster, size_t cluster_nbytes);

/* Compress a cluster to a raw deflate stream of at most `limit` bytes. Its length; 0 if it does not fit; -ENOMEM. */
ssize_t deflate_cluster(const uint8_t *cluster, size_t cluster_nbytes, int level, uint8_t *stream, size_t limit);
