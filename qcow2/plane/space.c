/* The host calls about space and the page cache that Python's os module lacks. -> 0 or -errno. */
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>

#include "qcow2/native.h"

static int change_space(int fd, int how, uint64_t host_offset, uint64_t nbytes)
{
    int result;

    do
        result = fallocate(fd, how | FALLOC_FL_KEEP_SIZE, (off_t)host_offset, (off_t)nbytes);
    while (result < 0 && errno == EINTR);
    return result < 0 ? -errno : 0;
}

int punch_hole(int fd, uint64_t host_offset, uint64_t nbytes)
{
    return change_space(fd, FALLOC_FL_PUNCH_HOLE, host_offset, nbytes);
}

/* Only where the host need not write zeros for it: tmpfs, which would, does not know FALLOC_FL_ZERO_RANGE. */
int reserve_space(int fd, uint64_t host_offset, uint64_t nbytes)
{
    return change_space(fd, FALLOC_FL_ZERO_RANGE, host_offset, nbytes);
}

int begin_writeback(int fd, uint64_t host_offset, uint64_t nbytes)
{
    return sync_file_range(fd, (off_t)host_offset, (off_t)nbytes, SYNC_FILE_RANGE_WRITE) < 0 ? -errno : 0;
}
