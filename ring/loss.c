#include "ring/loss.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/mman.h>

#define MAPPINGS 2048 /* guest memory of two front-ends, dirty logs, in-flight regions */

struct mapping {
    uintptr_t start;
    uint64_t nbytes; /* 0: unused; written last, read first */
    uint64_t page;
    uint32_t *counter;
    uint32_t losses; /* in this mapping */
};

uint32_t loss_counter;

static struct mapping mappings[MAPPINGS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* for those who change the table */
static struct sigaction before;

/* The mapping that is touched is in the table for as long as it is touched; others may come and go meanwhile. */
static bool replace_page(uintptr_t at)
{
    for (uint32_t i = 0; i < MAPPINGS; i++) {
        uint64_t nbytes = __atomic_load_n(&mappings[i].nbytes, __ATOMIC_ACQUIRE);
        uintptr_t start = __atomic_load_n(&mappings[i].start, __ATOMIC_RELAXED);
        uint64_t page = __atomic_load_n(&mappings[i].page, __ATOMIC_RELAXED);
        uint32_t *counter = __atomic_load_n(&mappings[i].counter, __ATOMIC_RELAXED);
        uint64_t first, run;

        if (at < start || at - start >= nbytes)
            continue;
        first = (at - start) / page * page; /* and no byte before or after the mapping: that is another's */
        run = nbytes - first < page ? nbytes - first : page;
        if (mmap((void *)(start + first), run, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) == MAP_FAILED)
            return false;
        __atomic_add_fetch(&mappings[i].losses, 1, __ATOMIC_RELAXED);
        __atomic_add_fetch(counter, 1, __ATOMIC_RELAXED);
        return true;
    }
    return false;
}

static void handle(int number, siginfo_t *info, void *context)
{
    int error = errno;

    (void)context;
    if (!replace_page((uintptr_t)info->si_addr))
        sigaction(number, &before, NULL); /* not ours: the instruction faults again, for whoever was there before us */
    errno = error;
}

static void install(void)
{
    struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_ONSTACK};

    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &before);
}

int loss_expect(void *mapping, uint64_t nbytes, uint64_t page, uint32_t *counter)
{
    static pthread_once_t installed = PTHREAD_ONCE_INIT;
    int result = -ENOMEM;

    pthread_once(&installed, install);
    pthread_mutex_lock(&lock);
    for (uint32_t i = 0; i < MAPPINGS && result < 0; i++) {
        if (mappings[i].nbytes)
            continue;
        __atomic_store_n(&mappings[i].start, (uintptr_t)mapping, __ATOMIC_RELAXED);
        __atomic_store_n(&mappings[i].page, page, __ATOMIC_RELAXED);
        __atomic_store_n(&mappings[i].counter, counter, __ATOMIC_RELAXED);
        __atomic_store_n(&mappings[i].losses, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&mappings[i].nbytes, nbytes, __ATOMIC_RELEASE);
        result = 0;
    }
    pthread_mutex_unlock(&lock);
    return result;
}

const uint32_t *loss_count_of(const void *mapping)
{
    const uint32_t *losses = NULL;

    pthread_mutex_lock(&lock);
    for (uint32_t i = 0; i < MAPPINGS; i++)
        if (mappings[i].nbytes && mappings[i].start == (uintptr_t)mapping)
            losses = &mappings[i].losses;
    pthread_mutex_unlock(&lock);
    return losses;
}

void loss_forget(void *mapping)
{
    pthread_mutex_lock(&lock);
    for (uint32_t i = 0; i < MAPPINGS; i++)
        if (mappings[i].nbytes && mappings[i].start == (uintptr_t)mapping)
            __atomic_store_n(&mappings[i].nbytes, 0, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&lock);
}
