/* Where a file lies: whether this thread may enter it, or may hang there for as long as somebody else likes. */
#pragma once

enum storage {
    STORAGE_NEAR,   /* memory or a disk of this host: a transfer of the page cache's ends soon */
    STORAGE_FAR,    /* a network or another process is in between, or nobody knows */
    STORAGE_STREAM, /* no file: a transfer waits for somebody else to come */
};

enum storage storage_of(int fd);
