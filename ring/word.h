/* A word of a file that is written often: stored through a mapping, without a system call. */
#pragma once

#include "ring/worker.h"

/* Let go of the mapping, if there is one. */
void word_forget(struct file *file);
