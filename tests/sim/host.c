#include "tests/sim/host.h"

#include <errno.h>
#include <liburing.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ring/assertion.h"
#include "ring/host.h"
#include "ring/pieces.h"
#include "ring/storage.h"
#include "ring/uring.h"

#define JOBS 2048
#define READY 8192
#define DIRECT_MEMORY 16u /* of memory: what malloc keeps, or chance would decide what is direct */
#define DIRECT_OFFSET 512u

/* Python's part, in the extension's wrapper. */
void sim_turn(void);
int sim_sleep(uint32_t milliseconds);
void sim_begin(uint32_t job, uint32_t opcode, int fd, uint64_t offset, uint64_t nbytes, uint32_t mode);
int64_t sim_perform(uint32_t job, uint32_t opcode, int fd, uint64_t offset, uint64_t nbytes, uint32_t mode);
int64_t sim_length(int fd);
int sim_write_ahead(int fd);
void sim_store(uint64_t address, const void *bytes, uint32_t nbytes);
void sim_signal(int fd);

struct job {
    bool used;
    uint64_t user_data;
    struct iovec *iovecs;
    uint64_t nbytes;
};

struct watch {
    bool armed;
    uint64_t user_data;
};

static struct sim state;
static uint64_t random_state;
static struct job jobs[JOBS];
static struct watch watches[SIM_FDS];
static uint64_t counts[SIM_FDS];
static bool direct[SIM_FDS]; /* opened with O_DIRECT */
static bool far[SIM_FDS];    /* where nothing is done at once */
static struct io_uring_sqe entries[URING_ENTRIES];
static uint32_t entry_count;
static struct uring_completion ready[READY];
static uint32_t ready_first, ready_count;
static bool turning; /* others act: what they touch is no call of the worker's */

static void require(bool claim, const char *what)
{
    if (claim)
        return;
    fprintf(stderr, "simulated host: %s\n", what);
    abort();
}

static uint64_t draw(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

struct sim *sim_state(void)
{
    return &state;
}

static void free_job(struct job *job)
{
    free(job->iovecs);
    *job = (struct job){0};
}

void sim_reset(uint64_t seed)
{
    for (uint32_t i = 0; i < JOBS; i++)
        free_job(&jobs[i]);
    memset(watches, 0, sizeof(watches));
    memset(counts, 0, sizeof(counts));
    memset(direct, 0, sizeof(direct));
    memset(far, 0, sizeof(far));
    entry_count = ready_first = ready_count = 0;
    state = (struct sim){.clock = state.clock, .due = UINT64_MAX, .turn = UINT64_MAX};
    random_state = seed * 0x9e3779b97f4a7c15u + 1;
}

void host_point(void)
{
    if (state.dead || turning)
        return;
    state.calls++;
    state.clock += draw() % 700;
    if (state.calls < state.turn && state.clock < state.due)
        return;
    turning = true;
    sim_turn();
    turning = false;
}

static bool lives(void)
{
    host_point();
    return !state.dead;
}

/* ---- jobs ---- */

static bool suits(uint64_t word, uint64_t alignment)
{
    return word % alignment == 0;
}

/* On this thread: the call might hang with the file's server. */
static void require_near(int fd)
{
    ASSERT(!far[fd]);
}

/* A kernel might refuse it, or read and write around it: neither is wanted. */
static void require_aligned(int fd, const struct iovec *iovecs, uint32_t count, uint64_t offset)
{
    for (uint32_t i = 0; direct[fd] && i < count; i++) {
        ASSERT(suits(offset, DIRECT_OFFSET));
        ASSERT(suits((uintptr_t)iovecs[i].iov_base, DIRECT_MEMORY));
        ASSERT(suits(iovecs[i].iov_len, DIRECT_OFFSET));
    }
}

static uint32_t new_job(uint64_t user_data, const struct iovec *iovecs, uint32_t count)
{
    uint32_t number = 0;
    struct job *job;

    while (jobs[number].used)
        require(++number < JOBS, "too many jobs");
    job = &jobs[number];
    *job = (struct job){.used = true, .user_data = user_data, .iovecs = malloc((count + 1) * sizeof(*iovecs))};
    for (uint32_t i = 0; i < count; i++) {
        job->iovecs[i] = iovecs[i];
        job->nbytes += iovecs[i].iov_len;
    }
    return number;
}

static void push(uint64_t user_data, int result, bool more)
{
    require(ready_count < READY, "too many completions");
    ready[(ready_first + ready_count++) % READY] = (struct uring_completion){user_data, result, more};
}

uint32_t sim_ready(void)
{
    return ready_count;
}

void sim_complete(uint32_t number, int result)
{
    struct job *job = &jobs[number];

    require(job->used, "a job ends twice");
    push(job->user_data, result, false);
    free_job(job);
}

void sim_job_load(uint32_t number, void *to)
{
    pieces_load(jobs[number].iovecs, 0, jobs[number].nbytes, to);
}

void sim_job_store(uint32_t number, const void *from, uint64_t nbytes)
{
    pieces_store(jobs[number].iovecs, 0, nbytes, from);
}

static bool is_vectored(uint8_t opcode)
{
    return opcode == IORING_OP_READV || opcode == IORING_OP_WRITEV;
}

static uint32_t job_of(const struct io_uring_sqe *entry)
{
    struct iovec single = {(void *)(uintptr_t)entry->addr, entry->len}, *iovecs = &single;
    uint32_t count = 1;

    if (entry->opcode == IORING_OP_FSYNC || entry->opcode == IORING_OP_FALLOCATE)
        return new_job(entry->user_data, NULL, 0);
    if (is_vectored(entry->opcode)) {
        iovecs = single.iov_base;
        count = entry->len;
    }
    require_aligned(entry->fd, iovecs, count, entry->off);
    return new_job(entry->user_data, iovecs, count);
}

static uint64_t length_of(const struct io_uring_sqe *entry, uint32_t job)
{
    return entry->opcode == IORING_OP_FALLOCATE ? entry->addr : jobs[job].nbytes;
}

/* ---- ring/uring.h ---- */

int uring_init(struct uring *uring, bool use_threads)
{
    uring->arena_used = 0;
    uring->threads = NULL;
    uring->arena = calloc(URING_ARENA, sizeof(*uring->arena));
    return uring->arena ? 0 : -ENOMEM;
}

void uring_deinit(struct uring *uring)
{
    free(uring->arena);
}

static void add_poll(const struct io_uring_sqe *entry)
{
    require(entry->fd >= 0 && entry->fd < SIM_FDS, "poll of a descriptor that is none");
    watches[entry->fd] = (struct watch){true, entry->user_data};
    if (counts[entry->fd])
        push(entry->user_data, POLLIN, true);
}

static void remove_poll(const struct io_uring_sqe *entry)
{
    for (int fd = 0; fd < SIM_FDS; fd++) {
        if (!watches[fd].armed || watches[fd].user_data != entry->addr)
            continue;
        watches[fd].armed = false;
        push(entry->addr, -ECANCELED, false);
        push(entry->user_data, 0, false);
        return;
    }
    push(entry->user_data, -ENOENT, false);
}

static void take(const struct io_uring_sqe *entry)
{
    uint32_t job;

    switch (entry->opcode) {
    case IORING_OP_POLL_ADD:
        add_poll(entry);
        break;
    case IORING_OP_POLL_REMOVE:
        remove_poll(entry);
        break;
    default:
        job = job_of(entry);
        sim_begin(job, entry->opcode, entry->fd, entry->off, length_of(entry, job), entry->len);
    }
}

int uring_submit(struct uring *uring)
{
    uint32_t taken = 0;

    if (!lives())
        return -ESHUTDOWN;
    while (taken < entry_count && draw() % 64)
        take(&entries[taken++]);
    entry_count -= taken;
    memmove(entries, entries + taken, entry_count * sizeof(*entries));
    if (!entry_count)
        uring->arena_used = 0;
    return state.dead ? -ESHUTDOWN : 0;
}

struct io_uring_sqe *uring_entry(struct uring *uring)
{
    uint32_t used = uring->arena_used; /* as in ring/uring.c */

    if (entry_count == URING_ENTRIES)
        uring_submit(uring);
    uring->arena_used = used;
    if (entry_count == URING_ENTRIES)
        return NULL;
    memset(&entries[entry_count], 0, sizeof(*entries));
    return &entries[entry_count++];
}

struct iovec *uring_iovecs(struct uring *uring, uint32_t count)
{
    struct iovec *iovecs;

    if (uring->arena_used + count > URING_ARENA)
        uring_submit(uring);
    if (uring->arena_used + count > URING_ARENA)
        return NULL;
    iovecs = uring->arena + uring->arena_used;
    uring->arena_used += count;
    return iovecs;
}

uint32_t uring_reap(struct uring *uring, struct uring_completion *completions, uint32_t count)
{
    uint32_t filled = 0;

    if (!lives())
        return 0;
    for (; filled < count && ready_count; filled++, ready_count--) {
        completions[filled] = ready[ready_first];
        ready_first = (ready_first + 1) % READY;
    }
    return filled;
}

static int sleep_until_woken(uint32_t milliseconds)
{
    int result;

    turning = true;
    result = sim_sleep(milliseconds);
    turning = false;
    return result;
}

int uring_wait(struct uring *uring, uint32_t milliseconds)
{
    do {
        int result = uring_submit(uring);
        if (result < 0)
            return result;
    } while (entry_count);
    if (ready_count)
        return 0;
    return state.dead ? -ESHUTDOWN : sleep_until_woken(milliseconds);
}

/* ---- ring/host.h ---- */

uint64_t host_now(void)
{
    host_point();
    return state.clock;
}

static int64_t perform(uint32_t job, uint8_t opcode, int fd, uint64_t offset, uint64_t nbytes, uint32_t mode)
{
    int64_t result = lives() ? sim_perform(job, opcode, fd, offset, nbytes, mode) : -EIO;

    free_job(&jobs[job]);
    return result;
}

int64_t host_read_cached(int fd, const struct iovec *iovecs, uint32_t count, uint64_t host_offset, bool is_memory)
{
    uint32_t job = new_job(0, iovecs, count);

    require_near(fd);
    require_aligned(fd, iovecs, count, host_offset);
    return perform(job, IORING_OP_READ, fd, host_offset, jobs[job].nbytes, 1);
}

int64_t host_write(int fd, const struct iovec *iovecs, uint32_t count, uint64_t host_offset)
{
    uint32_t job = new_job(0, iovecs, count);

    require_near(fd);
    require_aligned(fd, iovecs, count, host_offset);
    return perform(job, IORING_OP_WRITE, fd, host_offset, jobs[job].nbytes, 1);
}

int host_sync(int fd)
{
    require_near(fd);
    return (int)perform(new_job(0, NULL, 0), IORING_OP_FSYNC, fd, 0, 0, 0);
}

int host_perform(const struct io_uring_sqe *entry)
{
    uint32_t job = job_of(entry);

    require_near(entry->fd);
    return (int)perform(job, entry->opcode, entry->fd, entry->off, length_of(entry, job), 0);
}

int host_write_ahead(int fd)
{
    require_near(fd);
    return lives() ? sim_write_ahead(fd) : -EIO;
}

int host_length(int fd, uint64_t *nbytes)
{
    int64_t result = lives() ? sim_length(fd) : -EIO;

    *nbytes = result;
    return result < 0 ? (int)result : 0;
}

void host_store(uint8_t *memory, const void *bytes, uint32_t nbytes)
{
    if (!lives())
        return;
    memcpy(memory, bytes, nbytes);
    sim_store((uintptr_t)memory, bytes, nbytes);
}

uint8_t *host_map_file(int fd, uint64_t nbytes, bool writable, uint32_t *losses)
{
    return NULL; /* what it would read or take is in the page cache, where a read or write finds or leaves the same */
}

void host_unmap_file(const uint8_t *bytes, uint64_t nbytes)
{
}

bool host_holds(const uint8_t *bytes)
{
    return false;
}

void host_yield(void)
{
}

uint64_t host_waits(void)
{
    return 0;
}

struct host_alignment host_alignment(int fd)
{
    return (struct host_alignment){DIRECT_MEMORY, DIRECT_OFFSET};
}

bool host_is_waitable(int fd)
{
    return true;
}

void sim_add_file(int fd, int direct_fd, bool is_far)
{
    direct[direct_fd] = true;
    far[fd] = far[direct_fd] = is_far;
}

void sim_raise(int fd)
{
    counts[fd]++;
    if (watches[fd].armed)
        push(watches[fd].user_data, POLLIN, true);
}

uint64_t sim_count(int fd)
{
    return counts[fd];
}

void host_signal(int fd)
{
    if (lives())
        sim_signal(fd);
}

bool host_take_signal(int fd)
{
    bool taken = lives() && counts[fd];

    counts[fd] = 0;
    return taken;
}

void host_close(int fd)
{
    watches[fd].armed = false;
}

int host_expect_nudges(void)
{
    return 0;
}

void host_nudge(int thread)
{
    (void)thread;
}

/* ---- ring/storage.h ---- */

enum storage storage_of(int fd)
{
    return far[fd] ? STORAGE_FAR : STORAGE_NEAR;
}
