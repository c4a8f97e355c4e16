/* A host on which a process dies: preloaded into the daemon, it kills it before one call that changes files.
 *
 * DEATH says which, from 1 on, counted from the first unlink of a name that ends in DEATH_AFTER, or once a name that ends
 * in DEATH_RENAMED was given away, or without either from its start.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long left = -1; /* calls until death; below 0: not begun, or over */

static void begin(const char *which, const char *path)
{
    const char *after = getenv(which), *at = getenv("DEATH");
    size_t nbytes = strlen(path);

    if (after && at && left < 0 && nbytes >= strlen(after) && !strcmp(path + nbytes - strlen(after), after))
        left = atol(at);
}

__attribute__((constructor)) static void begin_at_once(void)
{
    const char *at = getenv("DEATH");

    if (at && !getenv("DEATH_AFTER") && !getenv("DEATH_RENAMED"))
        left = atol(at);
}

static void die_or_go_on(void)
{
    if (left > 0 && --left == 0)
        kill(getpid(), SIGKILL);
}

#define CALL(result, name, parameters, arguments)                           \
    result name parameters                                                  \
    {                                                                       \
        result(*next) parameters = (result(*) parameters)dlsym(RTLD_NEXT, #name); \
                                                                            \
        die_or_go_on();                                                     \
        return next arguments;                                              \
    }

CALL(int, linkat, (int from, const char *old, int to, const char *new, int flags), (from, old, to, new, flags))
CALL(int, fdatasync, (int fd), (fd))
CALL(int, ftruncate64, (int fd, off_t nbytes), (fd, nbytes))
CALL(int, fallocate64, (int fd, int mode, off_t offset, off_t nbytes), (fd, mode, offset, nbytes))
CALL(ssize_t, pwrite64, (int fd, const void *from, size_t nbytes, off_t offset), (fd, from, nbytes, offset))
CALL(ssize_t, pwritev64v2, (int fd, const struct iovec *iovecs, int count, off_t offset, int flags),
     (fd, iovecs, count, offset, flags))
CALL(ssize_t, pwritev64, (int fd, const struct iovec *iovecs, int count, off_t offset), (fd, iovecs, count, offset))

/* NO_LINKS: files have one name, as of FAT. */
int link(const char *old, const char *new)
{
    int (*next)(const char *, const char *) = (int (*)(const char *, const char *))dlsym(RTLD_NEXT, "link");

    if (getenv("NO_LINKS")) {
        errno = EPERM;
        return -1;
    }
    return next(old, new);
}

static void wait_for_end_of(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    char byte;

    while (read(fd, &byte, 1) > 0)
        ;
    close(fd);
}

/* Of directories alone: files have fdatasync. FSYNC_FAILS says which one does not reach the disk, from 1 on; FSYNC_WAITS
 * which one waits, until who has opened the pipe FSYNC_PIPE for writing closes it. */
int fsync(int fd)
{
    static atomic_long count;
    int (*next)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    const char *fails = getenv("FSYNC_FAILS"), *waits = getenv("FSYNC_WAITS");
    long number = ++count;

    die_or_go_on();
    if (waits && number == atol(waits))
        wait_for_end_of(getenv("FSYNC_PIPE"));
    if (fails && number == atol(fails)) {
        errno = EIO;
        return -1;
    }
    return next(fd);
}

int unlink(const char *path)
{
    int (*next)(const char *) = (int (*)(const char *))dlsym(RTLD_NEXT, "unlink");

    begin("DEATH_AFTER", path);
    die_or_go_on();
    return next(path);
}

int rename(const char *old, const char *new)
{
    int (*next)(const char *, const char *) = (int (*)(const char *, const char *))dlsym(RTLD_NEXT, "rename");
    int result;

    die_or_go_on();
    result = next(old, new);
    begin("DEATH_RENAMED", old);
    return result;
}
