/* A host that fails: preloaded into the daemon, it lets one system call on the image fail, once or for good.
 *
 * The C library's calls and liburing's submissions go through here. A submission that is to fail is replaced by a
 * read or write that does fail so. What to do is said, and what was done is told, in a file that both sides map.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/falloc.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define KINDS_MAX 65536
#define SECTOR 512

enum kind { NOTHING, READ, WRITE, SYNC, PUNCH, RESERVE, RESIZE, AHEAD, CLOSE };

/* tests/realfault/host.py has its twin */
struct told {
    uint64_t device, inode; /* of the image */
    uint64_t at;            /* the call that fails, from 1 on */
    uint64_t place, end;    /* unless it is the first write to these bytes */
    int32_t code, for_good, armed;
    _Atomic int32_t hit; /* enum kind */
    _Atomic uint64_t seen;
    uint8_t kinds[KINDS_MAX]; /* of those seen */
};

static struct told *told;
static int no_memory_fd = -1, full_fd = -1; /* reading at 0 fails with EIO, writing with ENOSPC */

__attribute__((constructor)) static void begin(void)
{
    const char *path = getenv("FAILING_HOST");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    void *mapped;

    if (fd < 0)
        return;
    mapped = mmap(NULL, sizeof(*told), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    no_memory_fd = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
    full_fd = open("/dev/full", O_WRONLY | O_CLOEXEC);
    if (mapped != MAP_FAILED && no_memory_fd >= 0 && full_fd >= 0)
        told = mapped;
}

static bool is_image(int fd)
{
    struct stat st;

    return fstat(fd, &st) == 0 && st.st_dev == told->device && st.st_ino == told->inode;
}

/* -> how this call fails; 0: it does not */
static int fate_at(int fd, enum kind kind, uint64_t offset)
{
    uint64_t number;
    bool is_aimed_at;

    if (!told || !told->armed || !is_image(fd))
        return 0;
    number = ++told->seen;
    if (number <= KINDS_MAX)
        told->kinds[number - 1] = kind;
    if (told->code == ENOSPC && kind != WRITE && kind != RESERVE && kind != RESIZE)
        return 0;
    is_aimed_at = number == told->at;
    if (told->end)
        is_aimed_at = kind == WRITE && offset >= told->place && offset < told->end && !told->hit;
    if (!is_aimed_at && !(told->for_good && told->hit == (int32_t)kind))
        return 0;
    told->hit = kind;
    return told->code;
}

static int fate(int fd, enum kind kind)
{
    return fate_at(fd, kind, 0);
}

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name)
{
    return dlsym(RTLD_NEXT, name);
}

static int fail(int code)
{
    errno = code;
    return -1;
}

/* Of a write of data half gets through: a short transfer that could not be carried on. */
static int fail_write(int fd, const struct iovec *iovecs, off_t offset, int code)
{
    size_t half = iovecs->iov_len / 2 / SECTOR * SECTOR;

    if (half && REAL(pwrite)(fd, iovecs->iov_base, half, offset) < 0)
        half = 0;
    return fail(code);
}

/* ---- the C library; off_t has 64 bits, so each function has two names ---- */

#define TWICE(result, name, other, parameters)                                                                         \
    result other parameters __attribute__((alias(#name)));                                                             \
    result name parameters

TWICE(ssize_t, pread, pread64, (int fd, void *data, size_t nbytes, off_t offset))
{
    int code = fate(fd, READ);
    return code ? fail(code) : REAL(pread)(fd, data, nbytes, offset);
}

TWICE(ssize_t, pwrite, pwrite64, (int fd, const void *data, size_t nbytes, off_t offset))
{
    struct iovec whole = {(void *)data, nbytes};
    int code = fate_at(fd, WRITE, (uint64_t)offset);
    return code ? fail_write(fd, &whole, offset, code) : REAL(pwrite)(fd, data, nbytes, offset);
}

TWICE(ssize_t, preadv, preadv64, (int fd, const struct iovec *iovecs, int count, off_t offset))
{
    int code = fate(fd, READ);
    return code ? fail(code) : REAL(preadv)(fd, iovecs, count, offset);
}

TWICE(ssize_t, pwritev, pwritev64, (int fd, const struct iovec *iovecs, int count, off_t offset))
{
    int code = fate_at(fd, WRITE, (uint64_t)offset);
    return code ? fail_write(fd, iovecs, offset, code) : REAL(pwritev)(fd, iovecs, count, offset);
}

TWICE(ssize_t, preadv2, preadv64v2, (int fd, const struct iovec *iovecs, int count, off_t offset, int flags))
{
    int code = fate(fd, READ);
    return code ? fail(code) : REAL(preadv2)(fd, iovecs, count, offset, flags);
}

TWICE(ssize_t, pwritev2, pwritev64v2, (int fd, const struct iovec *iovecs, int count, off_t offset, int flags))
{
    int code = fate_at(fd, WRITE, (uint64_t)offset);
    return code ? fail_write(fd, iovecs, offset, code) : REAL(pwritev2)(fd, iovecs, count, offset, flags);
}

/* The header is written by calls alone, which can fail. */
TWICE(void *, mmap, mmap64, (void *at, size_t nbytes, int protection, int flags, int fd, off_t offset))
{
    if (told && fd >= 0 && is_image(fd)) {
        errno = ENODEV;
        return MAP_FAILED;
    }
    return REAL(mmap)(at, nbytes, protection, flags, fd, offset);
}

TWICE(int, fallocate, fallocate64, (int fd, int mode, off_t offset, off_t nbytes))
{
    int code = fate(fd, mode & FALLOC_FL_PUNCH_HOLE ? PUNCH : RESERVE);
    return code ? fail(code) : REAL(fallocate)(fd, mode, offset, nbytes);
}

TWICE(int, posix_fallocate, posix_fallocate64, (int fd, off_t offset, off_t nbytes))
{
    int code = fate(fd, RESERVE);
    return code ? code : REAL(posix_fallocate)(fd, offset, nbytes);
}

TWICE(int, ftruncate, ftruncate64, (int fd, off_t nbytes))
{
    int code = fate(fd, RESIZE);
    return code ? fail(code) : REAL(ftruncate)(fd, nbytes);
}

int fdatasync(int fd)
{
    int code = fate(fd, SYNC);
    return code ? fail(code) : REAL(fdatasync)(fd);
}

int fsync(int fd)
{
    int code = fate(fd, SYNC);
    return code ? fail(code) : REAL(fsync)(fd);
}

/* What fails is closed all the same. */
int close(int fd)
{
    int code = fate(fd, CLOSE), result = REAL(close)(fd);
    return code ? fail(code) : result;
}

int sync_file_range(int fd, off_t offset, off_t nbytes, unsigned int flags)
{
    int code = fate(fd, AHEAD);
    return code ? fail(code) : REAL(sync_file_range)(fd, offset, nbytes, flags);
}

/* ---- liburing, which an extension of Python's has loaded for itself ---- */

#define LIBURING(name) ((__typeof__(&name))dlsym(dlopen("liburing.so.2", RTLD_LAZY | RTLD_NOLOAD), #name))

static enum kind kind_of(const struct io_uring_sqe *entry)
{
    switch (entry->opcode) {
    case IORING_OP_READ:
    case IORING_OP_READV:
        return READ;
    case IORING_OP_WRITE:
    case IORING_OP_WRITEV:
        return WRITE;
    case IORING_OP_FSYNC:
        return SYNC;
    case IORING_OP_FALLOCATE:
        return entry->len & FALLOC_FL_PUNCH_HOLE ? PUNCH : RESERVE;
    default:
        return NOTHING;
    }
}

static void condemn(struct io_uring_sqe *entry)
{
    static char scratch;
    enum kind kind = kind_of(entry);
    int code = kind == NOTHING ? 0 : fate_at(entry->fd, kind, entry->off);
    uint64_t user_data = entry->user_data;

    if (!code)
        return;
    if (code == ENOSPC)
        io_uring_prep_write(entry, full_fd, &scratch, 1, 0);
    else
        io_uring_prep_read(entry, no_memory_fd, &scratch, 1, 0);
    entry->user_data = user_data;
}

static void condemn_pending(struct io_uring *ring)
{
    for (unsigned int i = ring->sq.sqe_head; i != ring->sq.sqe_tail; i++)
        condemn(&ring->sq.sqes[i & *ring->sq.kring_mask]);
}

int io_uring_submit(struct io_uring *ring)
{
    condemn_pending(ring);
    return LIBURING(io_uring_submit)(ring);
}

int io_uring_submit_and_wait(struct io_uring *ring, unsigned int count)
{
    condemn_pending(ring);
    return LIBURING(io_uring_submit_and_wait)(ring, count);
}

int io_uring_submit_and_wait_timeout(struct io_uring *ring, struct io_uring_cqe **completion, unsigned int count,
                                     struct __kernel_timespec *timeout, sigset_t *mask)
{
    condemn_pending(ring);
    return LIBURING(io_uring_submit_and_wait_timeout)(ring, completion, count, timeout, mask);
}
