/* A host of which one seed decides what happens: in place of ring/host.c, storage.c, uring.c and threads.c.
 *
 * Eventfds, polls, the clock and the memory of what is under way are here; what
 * files hold, how long things take and how they end is decided in
 * tests/sim/kernel.py, which is called only when something is due.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#define SIM_FDS 4096 /* descriptors are below it */

struct sim {
    uint64_t clock;
    uint64_t due;
    uint64_t calls;
    uint64_t turn;
    uint32_t dead;
};

struct sim *sim_state(void);
void sim_reset(uint64_t seed);
/* How many completions wait to be reaped. */
uint32_t sim_ready(void);
/* End a job; its number is free again. */
void sim_complete(uint32_t job, int result);
/* Copy what it writes out, or what it reads in. */
void sim_job_load(uint32_t job, void *to);
void sim_job_store(uint32_t job, const void *from, uint64_t nbytes);
/* A file, and its descriptor for O_DIRECT: what that takes is checked, and who enters one that is far. */
void sim_add_file(int fd, int direct_fd, bool is_far);
/* Signal an eventfd; sim_count: signals that nobody took. */
void sim_raise(int fd);
uint64_t sim_count(int fd);

/* Something happens that another process could see, or time passes: a death may strike here, a guest may act. */
void host_point(void);
