/* Where a file lies: whether this thread may enter it, or may hang there for as long as somebody else likes. */
#pragma once

#include <stdbool.h>

enum storage {
    STORAGE_NEAR,   /* a disk of this host: a transfer of the page cache's ends soon */
    STORAGE_MEMORY, /* memory of this host: it is its own page cache */
    STORAGE_FAR,    /* a network or another process is in between, or nobody knows */
    STORAGE_STREAM, /* no file: a transfer waits for somebody else to come */
};

enum storage storage_of(int fd);

static inline bool storage_is_near(enum storage storage)
{
    return storage == STORAGE_NEAR || storage == STORAGE_MEMORY;
}
