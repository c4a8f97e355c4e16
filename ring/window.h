/* A file's pages that were read before, read through a mapping: a copy, and no system call. */
#pragma once

#include "ring/gather.h"

/* Copy what every page of was seen in the page cache. -> bytes; -EAGAIN: read it otherwise. */
int64_t window_read(struct file *file, const struct gather *gather, uint64_t host_offset);
/* So many bytes were read from the page cache: next time they may be copied. */
void window_note(struct file *file, uint64_t host_offset, uint64_t nbytes, uint64_t now);
/* A copy took so long: did it wait for the disk? Then what was seen is not there any more. */
void window_ended(struct file *file, uint64_t began, uint64_t ended);
/* How much of a file to map that reaches to `end`: a power of two, past the end of most; it holds what they grow by. */
uint64_t window_size(uint64_t end);
void window_close(struct file *file);
