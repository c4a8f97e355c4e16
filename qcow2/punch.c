/* The one host call of the blocking driver that Python's os module lacks. */
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>

#include "qcow2/native.h"

int punch_hole(int fd, uint64_t host_offset, uint64_t nbytes)
{
    int result;

    do
        result = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)host_offset, (off_t)nbytes);
    while (result < 0 && errno == EINTR);
    return result < 0 ? -errno : 0;
}
