/* A signal as an event. Python runs a handler of its own between two of its instructions: one that comes right before
 * a poll, or to another thread, is heard when that returns. For the extension of each room that waits for signals. */
#pragma once

#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <unistd.h>

static volatile sig_atomic_t stop_fd;

static void stop_tell(int number)
{
    const uint64_t one = 1;
    int before = errno;

    (void)number;
    (void)!write(stop_fd, &one, sizeof one);
    errno = before;
}

/* Add one to event_fd at each signal `number`, whichever thread gets it; one descriptor for all signals. */
static inline void tell_at_signal(int number, int event_fd)
{
    struct sigaction action = {.sa_handler = stop_tell};

    stop_fd = event_fd;
    sigaction(number, &action, NULL);
}
