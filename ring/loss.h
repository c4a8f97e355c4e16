/* Shared memory that is gone when it is touched: its file was truncated, a page has a hardware error, or the pool of
 * huge pages ran dry. The kernel says so with SIGBUS.
 *
 * The handler maps zeros over the page, counts, and lets the thread go on. What
 * was read is zeros then, and what was written nobody will see: whoever touches
 * shared memory compares the count before it believes what it has read. The zeros
 * stay, for all who come later: of guest memory each region has a count of its
 * own, and nothing that lies in one that has lost a page is believed any more.
 */
#pragma once

#include <stdint.h>

/* Expect losses in a mapping, of pages of so many bytes, until `loss_forget`; *counter counts them.
 * -> 0; -ENOMEM: too many mappings. */
int loss_expect(void *mapping, uint64_t nbytes, uint64_t page, uint32_t *counter);
void loss_forget(void *mapping);
/* The losses in this mapping alone, counted until it is forgotten. */
const uint32_t *loss_count_of(const void *mapping);

extern uint32_t loss_counter; /* of memory shared with a front-end */

static inline uint32_t loss_count(void)
{
    return __atomic_load_n(&loss_counter, __ATOMIC_RELAXED);
}
