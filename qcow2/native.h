/* What qcow2's C offers to its cffi wrapper; the contracts stand in the headers, `native.cdef` repeats the prototypes. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "qcow2/l2cache.h"
#include "qcow2/refcount.h"
#include "qcow2/tally.h"

/* Deallocate nbytes at host_offset without changing the file's length; 0 or -errno. */
int punch_hole(int fd, uint64_t host_offset, uint64_t nbytes);
