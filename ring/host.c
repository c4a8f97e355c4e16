#include "ring/host.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "ring/loss.h"
#include "ring/threads.h"

uint64_t host_now(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * UINT64_C(1000000000) + now.tv_nsec;
}

/* ---- files ---- */

/* tmpfs knows no RWF_NOWAIT (Linux 6.18). */
int64_t host_read_cached(int fd, const struct iovec *iovecs, uint32_t count, uint64_t host_offset, bool is_memory)
{
    ssize_t result;

    do
        result = preadv2(fd, iovecs, (int)count, host_offset, is_memory ? 0 : RWF_NOWAIT);
    while (result < 0 && errno == EINTR);
    if (result < 0)
        return errno == EOPNOTSUPP ? -EAGAIN : -errno;
    return result;
}

int64_t host_write(int fd, const struct iovec *iovecs, uint32_t count, uint64_t host_offset)
{
    ssize_t result;

    do
        result = pwritev2(fd, iovecs, (int)count, host_offset, 0);
    while (result < 0 && errno == EINTR);
    if (result < 0)
        return errno == EOPNOTSUPP ? -EAGAIN : -errno;
    return result;
}

int host_sync(int fd)
{
    int result;

    do
        result = fdatasync(fd) < 0 ? -errno : 0;
    while (result == -EINTR); /* a nudge may come late, and some file systems let it end a sync */
    return result;
}

int host_write_ahead(int fd)
{
    return sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WRITE) < 0 ? -errno : 0;
}

int host_length(int fd, uint64_t *nbytes)
{
    struct statx stx;

    if (statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_TYPE | STATX_SIZE, &stx) < 0)
        return -errno;
    *nbytes = S_ISREG(stx.stx_mode) ? stx.stx_size : UINT64_MAX;
    return 0;
}

int host_perform(const struct io_uring_sqe *entry)
{
    return threads_perform(entry);
}

void host_store(uint8_t *memory, const void *bytes, uint32_t nbytes)
{
    memcpy(memory, bytes, nbytes);
}

/* Where addresses are few what is needed comes first. */
static bool addresses_abound(void)
{
    struct rlimit limit;

    return getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur == RLIM_INFINITY;
}

uint8_t *host_map_file(int fd, uint64_t nbytes, bool writable, uint32_t *losses)
{
    int protection = writable ? PROT_READ | PROT_WRITE : PROT_READ;
    void *bytes = addresses_abound() ? mmap(NULL, nbytes, protection, MAP_SHARED, fd, 0) : MAP_FAILED;

    if (bytes == MAP_FAILED)
        return NULL;
    madvise(bytes, nbytes, MADV_DONTDUMP);
    if (loss_expect(bytes, nbytes, HOST_PAGE, losses) == 0)
        return bytes;
    munmap(bytes, nbytes);
    return NULL;
}

void host_unmap_file(const uint8_t *bytes, uint64_t nbytes)
{
    loss_forget((void *)(uintptr_t)bytes);
    munmap((void *)(uintptr_t)bytes, nbytes);
}

bool host_holds(const uint8_t *bytes)
{
    uint8_t held[HOST_STRETCH];

    if (mincore((void *)(uintptr_t)bytes, HOST_STRETCH * HOST_PAGE, held))
        return false;
    for (unsigned int page = 0; page < HOST_STRETCH; page++)
        if (!(held[page] & 1))
            return false;
    return true;
}

uint64_t host_waits(void)
{
    struct rusage usage;

    return getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_majflt : 0;
}

/* Whether O_DIRECT reads 512 bytes at 512. */
static bool takes_sectors(int fd)
{
    void *page = aligned_alloc(4096, 4096);
    bool taken = page && pread(fd, page, 512, 512) >= 0;

    free(page);
    return taken;
}

/* 4096 suits every disk that does not say. */
struct host_alignment host_alignment(int fd)
{
    struct host_alignment alignment = {4096, 4096};
#ifdef STATX_DIOALIGN
    struct statx stx;

    if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &stx) == 0 && stx.stx_mask & STATX_DIOALIGN &&
        stx.stx_dio_mem_align && stx.stx_dio_offset_align)
        alignment = (struct host_alignment){stx.stx_dio_mem_align, stx.stx_dio_offset_align};
#endif
    if (takes_sectors(fd))
        alignment.offset = 512;
    return alignment;
}

/* ---- eventfds ---- */

/* An eventfd has no file type. */
bool host_is_waitable(int fd)
{
    struct stat st;

    return fstat(fd, &st) == 0 && ((st.st_mode & S_IFMT) == 0 || S_ISFIFO(st.st_mode) || S_ISSOCK(st.st_mode));
}

/* The flag is of the open file, which the front-end shares and may have taken back: look before each use. One that
 * takes it back between the look and the use has us sleep until somebody who waits for us calls worker_nudge. */
static void make_nonblocking(int fd)
{
    int flags = fcntl(fd, F_GETFL);

    if (flags >= 0 && !(flags & O_NONBLOCK))
        fcntl(fd, F_SETFL, flags | O_NONBLOCK);
}

void host_signal(int fd)
{
    uint64_t one = 1;

    make_nonblocking(fd);
    (void)!write(fd, &one, sizeof(one));
}

/* An eventfd can be read without waiting whatever its flag says; writing to one knows no such way (Linux 6.18). */
bool host_take_signal(int fd)
{
    uint64_t count;
    struct iovec piece = {&count, sizeof(count)};
    ssize_t taken = preadv2(fd, &piece, 1, -1, RWF_NOWAIT);

    if (taken < 0 && errno == EOPNOTSUPP) {
        make_nonblocking(fd);
        taken = read(fd, &count, sizeof(count));
    }
    return taken > 0;
}

void host_close(int fd)
{
    close(fd);
}

/* ---- the worker's thread ---- */

void host_yield(void)
{
    sched_yield();
}

static void ignore(int number)
{
    (void)number;
}

/* SIGURG: nobody acts on it by default. */
int host_expect_nudges(void)
{
    struct sigaction before, action = {.sa_handler = ignore};
    sigset_t nudge;

    if (sigaction(SIGURG, NULL, &before) == 0 && (before.sa_handler == SIG_DFL || before.sa_handler == SIG_IGN))
        sigaction(SIGURG, &action, NULL);
    sigemptyset(&nudge);
    sigaddset(&nudge, SIGURG);
    pthread_sigmask(SIG_UNBLOCK, &nudge, NULL);
    return gettid();
}

void host_nudge(int thread)
{
    tgkill(getpid(), thread, SIGURG);
}
