#include "ring/threads.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <unistd.h>

#include "ring/uring.h"

#define STACK_NBYTES (128u << 10)
#define JOBS 2304       /* every operation and every file's sync of a worker */
#define JOB_IOVECS 64   /* what is longer is transferred in part, and its caller goes on */
#define WATCHES 512     /* every kick of a worker, the control fd, and as many that are being replaced */
#define READY (4 * WATCHES) /* completions that need no thread */
#define WAKE UINT64_MAX /* the epoll's name for the wake fd */

struct job {
    struct job *next;
    struct io_uring_sqe entry;
    struct iovec iovecs[JOB_IOVECS];
    int result;
};

struct jobs {
    struct job *first;
    struct job **last;
};

/* A duplicate of the polled fd: its owner closes that before the poll is removed. */
struct watch {
    uint64_t user_data;
    int fd;
};

struct threads {
    /* the owner's alone */
    struct io_uring_sqe pending[URING_ENTRIES];
    uint32_t pending_count;
    struct job *free_jobs;
    struct job *jobs;
    struct watch watches[WATCHES];
    uint32_t watch_count;
    struct uring_completion ready[READY];
    uint32_t ready_first, ready_count;
    int epoll_fd;
    int wake_fd;

    pthread_mutex_t lock; /* of what follows */
    pthread_cond_t work;
    struct jobs queue;
    struct jobs done;
    uint32_t queued;
    uint32_t idle;     /* threads that wait for a job, */
    uint32_t starting; /* or are about to look for one */
    uint32_t count;
    bool sleeping; /* the owner is, or will be: wake it */
    bool stopping;
    pthread_t threads[URING_THREADS];
};

static void jobs_init(struct jobs *jobs)
{
    jobs->first = NULL;
    jobs->last = &jobs->first;
}

static void jobs_append(struct jobs *jobs, struct job *job)
{
    job->next = NULL;
    *jobs->last = job;
    jobs->last = &job->next;
}

static struct job *jobs_take(struct jobs *jobs)
{
    struct job *job = jobs->first;

    if (job) {
        jobs->first = job->next;
        if (!jobs->first)
            jobs->last = &jobs->first;
    }
    return job;
}

/* ---- on the threads ---- */

static bool is_vectored(uint8_t opcode)
{
    return opcode == IORING_OP_READV || opcode == IORING_OP_WRITEV;
}

static ssize_t transfer(const struct io_uring_sqe *entry, const struct iovec *iovecs, off_t offset)
{
    int count = is_vectored(entry->opcode) ? (int)entry->len : 1;

    if (entry->opcode == IORING_OP_READ || entry->opcode == IORING_OP_READV)
        return preadv2(entry->fd, iovecs, count, offset, entry->rw_flags);
    return pwritev2(entry->fd, iovecs, count, offset, entry->rw_flags);
}

/* -> what a ring's completion would say */
static int perform(const struct io_uring_sqe *entry, const struct iovec *iovecs)
{
    ssize_t result;

    switch (entry->opcode) {
    case IORING_OP_READ:
    case IORING_OP_READV:
    case IORING_OP_WRITE:
    case IORING_OP_WRITEV:
        result = transfer(entry, iovecs, entry->off);
        if (result < 0 && errno == ESPIPE)
            result = transfer(entry, iovecs, -1); /* as a ring does: a stream has no offsets */
        break;
    case IORING_OP_FSYNC:
        result = entry->fsync_flags & IORING_FSYNC_DATASYNC ? fdatasync(entry->fd) : fsync(entry->fd);
        break;
    case IORING_OP_FALLOCATE:
        result = fallocate(entry->fd, entry->len, entry->off, entry->addr);
        break;
    default:
        return -EINVAL;
    }
    return result < 0 ? -errno : (int)result;
}

int threads_perform(const struct io_uring_sqe *entry)
{
    void *address = (void *)(uintptr_t)entry->addr;
    struct iovec single = {address, entry->len};

    return perform(entry, is_vectored(entry->opcode) ? address : &single);
}

static void wake_owner(struct threads *threads)
{
    threads->sleeping = false;
    eventfd_write(threads->wake_fd, 1);
}

static void *run(void *argument)
{
    struct threads *threads = argument;

    pthread_mutex_lock(&threads->lock);
    threads->starting--;
    for (;;) {
        struct job *job;

        while (!threads->queue.first && !threads->stopping) {
            threads->idle++;
            pthread_cond_wait(&threads->work, &threads->lock);
            threads->idle--;
        }
        job = jobs_take(&threads->queue);
        if (!job)
            break;
        threads->queued--;
        pthread_mutex_unlock(&threads->lock);
        job->result = perform(&job->entry, job->iovecs);
        pthread_mutex_lock(&threads->lock);
        jobs_append(&threads->done, job);
        if (threads->sleeping)
            wake_owner(threads);
    }
    pthread_mutex_unlock(&threads->lock);
    return NULL;
}

/* With the lock held, or before there is another thread. -> 0 or -errno */
static int start_thread(struct threads *threads)
{
    pthread_attr_t attributes;
    sigset_t all, before;
    int error;

    sigfillset(&all); /* signals are for the threads that expect them */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_NBYTES);
    threads->starting++;
    error = pthread_create(&threads->threads[threads->count], &attributes, run, threads);
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error) {
        threads->starting--;
        return -error;
    }
    threads->count++;
    return 0;
}

/* ---- completions that need no thread ---- */

static void complete(struct threads *threads, uint64_t user_data, int result, bool more)
{
    uint32_t position = (threads->ready_first + threads->ready_count) % READY;

    threads->ready[position] = (struct uring_completion){user_data, result, more};
    threads->ready_count++;
}

/* Edge-triggered, as a ring's multishot polls are: each wake-up of the file is told once. */
static int add_watch(struct threads *threads, const struct io_uring_sqe *entry)
{
    struct epoll_event event = {.events = entry->poll32_events | EPOLLET, .data.u64 = entry->user_data};
    int fd;

    if (threads->watch_count == WATCHES)
        return -ENOMEM;
    fd = fcntl(entry->fd, F_DUPFD_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    if (epoll_ctl(threads->epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0) {
        int error = errno;
        close(fd);
        return -error;
    }
    threads->watches[threads->watch_count++] = (struct watch){entry->user_data, fd};
    return 0;
}

static void drop_watch(struct threads *threads, uint32_t position)
{
    struct watch *watch = &threads->watches[position];

    epoll_ctl(threads->epoll_fd, EPOLL_CTL_DEL, watch->fd, NULL);
    close(watch->fd);
    *watch = threads->watches[--threads->watch_count];
}

static void remove_watch(struct threads *threads, const struct io_uring_sqe *entry)
{
    for (uint32_t i = 0; i < threads->watch_count; i++) {
        if (threads->watches[i].user_data != entry->addr)
            continue;
        drop_watch(threads, i);
        complete(threads, entry->addr, -ECANCELED, false);
        complete(threads, entry->user_data, 0, false);
        return;
    }
    complete(threads, entry->user_data, -ENOENT, false);
}

/* Collect what the epoll has; of the wake fd only that it was signalled. -> 0 or -errno */
static int look(struct threads *threads, int milliseconds)
{
    struct epoll_event events[64];
    int room = READY - threads->ready_count < 64 ? (int)(READY - threads->ready_count) : 64;
    int count = room ? epoll_wait(threads->epoll_fd, events, room, milliseconds) : 0;
    eventfd_t ignored;

    if (count < 0)
        return errno == EINTR ? 0 : -errno;
    for (int i = 0; i < count; i++) {
        if (events[i].data.u64 == WAKE)
            eventfd_read(threads->wake_fd, &ignored);
        else
            complete(threads, events[i].data.u64, (int)events[i].events, true);
    }
    return 0;
}

/* ---- for the owner ---- */

static int open_fds(struct threads *threads)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = WAKE};

    threads->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    threads->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (threads->epoll_fd < 0 || threads->wake_fd < 0 ||
        epoll_ctl(threads->epoll_fd, EPOLL_CTL_ADD, threads->wake_fd, &event) < 0)
        return -errno;
    return 0;
}

struct threads *threads_create(int *error)
{
    struct threads *threads = calloc(1, sizeof(*threads));
    struct job *jobs = calloc(JOBS, sizeof(*jobs));

    if (!threads || !jobs) {
        free(threads);
        free(jobs);
        *error = -ENOMEM;
        return NULL;
    }
    threads->jobs = jobs;
    for (uint32_t i = 0; i < JOBS; i++) {
        jobs[i].next = threads->free_jobs;
        threads->free_jobs = &jobs[i];
    }
    jobs_init(&threads->queue);
    jobs_init(&threads->done);
    pthread_mutex_init(&threads->lock, NULL);
    pthread_cond_init(&threads->work, NULL);
    threads->epoll_fd = threads->wake_fd = -1;
    *error = open_fds(threads);
    if (*error == 0)
        *error = start_thread(threads);
    if (*error == 0)
        return threads;
    threads_destroy(threads);
    return NULL;
}

void threads_destroy(struct threads *threads)
{
    pthread_mutex_lock(&threads->lock);
    threads->stopping = true;
    pthread_cond_broadcast(&threads->work);
    pthread_mutex_unlock(&threads->lock);
    for (uint32_t i = 0; i < threads->count; i++)
        pthread_join(threads->threads[i], NULL);
    while (threads->watch_count)
        drop_watch(threads, 0);
    if (threads->epoll_fd >= 0)
        close(threads->epoll_fd);
    if (threads->wake_fd >= 0)
        close(threads->wake_fd);
    pthread_cond_destroy(&threads->work);
    pthread_mutex_destroy(&threads->lock);
    free(threads->jobs);
    free(threads);
}

struct io_uring_sqe *threads_entry(struct threads *threads)
{
    struct io_uring_sqe *entry = &threads->pending[threads->pending_count];

    if (threads->pending_count == URING_ENTRIES)
        return NULL;
    threads->pending_count++;
    memset(entry, 0, sizeof(*entry));
    return entry;
}

uint32_t threads_pending(const struct threads *threads)
{
    return threads->pending_count;
}

static void fill_job(struct job *job, const struct io_uring_sqe *entry)
{
    void *address = (void *)(uintptr_t)entry->addr;

    job->entry = *entry;
    if (is_vectored(entry->opcode)) {
        job->entry.len = entry->len < JOB_IOVECS ? entry->len : JOB_IOVECS;
        memcpy(job->iovecs, address, job->entry.len * sizeof(*job->iovecs));
    } else {
        job->iovecs[0] = (struct iovec){address, entry->len};
    }
}

/* -> whether there was room for it */
static bool take(struct threads *threads, const struct io_uring_sqe *entry, struct jobs *jobs)
{
    struct job *job = threads->free_jobs;
    int result;

    if (READY - threads->ready_count < 2)
        return false;
    switch (entry->opcode) {
    case IORING_OP_POLL_ADD:
        result = add_watch(threads, entry);
        if (result < 0)
            complete(threads, entry->user_data, result, false);
        return true;
    case IORING_OP_POLL_REMOVE:
        remove_watch(threads, entry);
        return true;
    default:
        if (!job)
            return false;
        threads->free_jobs = job->next;
        fill_job(job, entry);
        jobs_append(jobs, job);
        return true;
    }
}

/* Hand jobs to the threads that wait; more are started if they are too few, since each of the others may hang. */
static void enqueue(struct threads *threads, struct jobs *jobs)
{
    uint32_t wanted = 0;

    pthread_mutex_lock(&threads->lock);
    for (struct job *job; (job = jobs_take(jobs)); wanted++)
        jobs_append(&threads->queue, job);
    threads->queued += wanted;
    while (threads->queued > threads->idle + threads->starting && threads->count < URING_THREADS)
        if (start_thread(threads) < 0)
            break; /* the others do the work */
    for (uint32_t i = 0; i < wanted && i < threads->idle; i++)
        pthread_cond_signal(&threads->work);
    pthread_mutex_unlock(&threads->lock);
}

void threads_submit(struct threads *threads)
{
    uint32_t taken = 0;
    struct jobs jobs;

    jobs_init(&jobs);
    while (taken < threads->pending_count && take(threads, &threads->pending[taken], &jobs))
        taken++;
    threads->pending_count -= taken;
    memmove(threads->pending, threads->pending + taken, threads->pending_count * sizeof(*threads->pending));
    if (jobs.first)
        enqueue(threads, &jobs);
}

static uint32_t reap_ready(struct threads *threads, struct uring_completion *completions, uint32_t count)
{
    uint32_t i;

    for (i = 0; i < count && threads->ready_count; i++) {
        completions[i] = threads->ready[threads->ready_first];
        threads->ready_first = (threads->ready_first + 1) % READY;
        threads->ready_count--;
    }
    return i;
}

static uint32_t reap_done(struct threads *threads, struct uring_completion *completions, uint32_t count)
{
    uint32_t i = 0;

    pthread_mutex_lock(&threads->lock);
    for (struct job *job; i < count && (job = jobs_take(&threads->done)); i++) {
        completions[i] = (struct uring_completion){job->entry.user_data, job->result, false};
        job->next = threads->free_jobs;
        threads->free_jobs = job;
    }
    pthread_mutex_unlock(&threads->lock);
    return i;
}

uint32_t threads_reap(struct threads *threads, struct uring_completion *completions, uint32_t count)
{
    uint32_t filled;

    look(threads, 0); /* if that fails, so does the next threads_wait, and says so */
    filled = reap_ready(threads, completions, count);
    return filled + reap_done(threads, completions + filled, count - filled);
}

int threads_wait(struct threads *threads, uint32_t milliseconds)
{
    bool must_sleep;
    int result;

    pthread_mutex_lock(&threads->lock);
    must_sleep = threads->sleeping = !threads->ready_count && !threads->done.first;
    pthread_mutex_unlock(&threads->lock);
    if (!must_sleep)
        return 0;
    result = look(threads, milliseconds ? (int)milliseconds : -1);
    pthread_mutex_lock(&threads->lock);
    threads->sleeping = false;
    pthread_mutex_unlock(&threads->lock);
    return result;
}
