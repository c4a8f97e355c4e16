/* Looking at the rings for a moment before sleeping: a wake-up costs more than a small request.
 *
 * How long, learns from the last sleep: one that ended within the limit would
 * better have been spent looking, a long one makes the next look shorter. An
 * idle worker so comes to sleep at once.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "ring/pace.h"

#define POLL_FIRST_NS 4000u
#define POLL_ALONE_NS 4000u /* the core is not offered to others before */

struct poll {
    uint64_t limit; /* ns; 0: never look */
    uint64_t window; /* ns, of the next look */
    uint64_t until;  /* this one ends then; 0: none is under way */
    uint64_t slept;  /* the sleep began then */
};

/* Leave the core to its sibling between two looks; a driver that is not soon back may wait for this very core. */
static inline void poll_relax(const struct poll *poll, uint64_t now)
{
    if (poll->until - now + POLL_ALONE_NS < poll->window) {
        host_yield();
        return;
    }
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Nothing is to be done. -> whether to look again instead of sleeping. */
static inline bool poll_again(struct poll *poll)
{
    uint64_t now;

    if (!poll->window)
        return false;
    now = pace_now();
    if (!poll->until)
        poll->until = now + poll->window;
    if (now >= poll->until)
        return false;
    poll_relax(poll, now);
    return true;
}

/* There was something to do. */
static inline void poll_found(struct poll *poll)
{
    poll->until = 0;
}

static inline void poll_sleeps(struct poll *poll)
{
    poll->until = 0;
    poll->slept = poll->limit ? pace_now() : 0;
}

static inline void poll_woke(struct poll *poll)
{
    if (!poll->limit)
        return;
    if (pace_now() - poll->slept > poll->limit)
        poll->window = poll->window / 2 < POLL_FIRST_NS ? 0 : poll->window / 2;
    else if (poll->window < POLL_FIRST_NS)
        poll->window = POLL_FIRST_NS < poll->limit ? POLL_FIRST_NS : poll->limit;
    else
        poll->window = 2 * poll->window < poll->limit ? 2 * poll->window : poll->limit;
}
