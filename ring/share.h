/* How the many share what there is little of: whoever asks may have as much as is left for the others.
 *
 * Alone one gets half of it. Who hangs keeps what it has, and the next gets
 * half of the rest; there is always some for who has none.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

static inline bool share_allows(uint64_t own, uint64_t left)
{
    return own < left;
}
