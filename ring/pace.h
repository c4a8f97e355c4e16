/* Pace: how quickly a file takes what is moved on the worker's own thread.
 *
 * A small buffered transfer costs less than handing it to another thread, as
 * io_uring does with every buffered write that the file system cannot promise
 * to take without sleeping, and few can. But the host may make whoever writes
 * wait: for memory to be cleaned, for its journal. One transfer that took long
 * sends the ones after it through io_uring for a while, longer each time. After
 * one that took very long, as of a throttled disk, that while is in proportion:
 * such a disk holds this thread up for a ninth of the time at most.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "ring/host.h"

#define PACE_NBYTES (64u << 10) /* what is larger gains from another core more than it loses by the wake-up */
#define PACE_STALL_NS 2000000u
#define PACE_REST_MIN_NS 1000000u
#define PACE_REST_MAX_NS 256000000u
#define PACE_LONG_NS 50000000u
#define PACE_LONG_RESTS 8u
#define PACE_TRUST 1000u /* quick transfers in a row that make the next stall a first one again */

struct pace {
    uint64_t resumes; /* at this time; before it nothing is moved at once */
    uint32_t rest;    /* ns, of the last stall; 0: none lately */
    uint32_t quick;   /* transfers since */
};

static inline uint64_t pace_now(void)
{
    return host_now();
}

static inline bool pace_allows(const struct pace *pace, uint64_t now)
{
    return now >= pace->resumes;
}

/* A transfer has ended. -> whether it was a stall. */
static inline bool pace_note(struct pace *pace, uint64_t began, uint64_t ended)
{
    if (ended - began < PACE_STALL_NS) {
        if (pace->rest && ++pace->quick == PACE_TRUST)
            pace->rest = 0;
        return false;
    }
    pace->rest = !pace->rest ? PACE_REST_MIN_NS : pace->rest < PACE_REST_MAX_NS ? 2 * pace->rest : PACE_REST_MAX_NS;
    pace->resumes = ended + (ended - began < PACE_LONG_NS ? pace->rest : PACE_LONG_RESTS * (ended - began));
    pace->quick = 0;
    return true;
}
