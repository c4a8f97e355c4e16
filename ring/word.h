/* Words of a file that are written often: stored through a mapping, without a system call. */
#pragma once

#include "ring/worker.h"

/* Up to 8 bytes from an offset that 8 divides. -> false: write them otherwise. */
bool word_store(struct file *file, uint64_t host_offset, const void *bytes, uint32_t nbytes);
/* Let go of the mapping, if there is one. */
void word_forget(struct file *file);
