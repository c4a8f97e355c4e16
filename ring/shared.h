/* The only ways to touch memory that a guest may change under us.
 *
 * Values are copied once; what was copied is validated, and the guest's memory
 * is not looked at again.
 */
#pragma once

#include <stdint.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "rings are little-endian and read without swapping");

/* A 16-bit index, read so that nothing after it is read before it. */
static inline uint16_t shared_load_acquire16(const uint16_t *shared)
{
    return __atomic_load_n(shared, __ATOMIC_ACQUIRE);
}

/* A 16-bit field whose order against others does not matter. */
static inline uint16_t shared_load16(const uint16_t *shared)
{
    return __atomic_load_n(shared, __ATOMIC_RELAXED);
}

/* A 16-bit index, published after everything written before it. */
static inline void shared_store_release16(uint16_t *shared, uint16_t value)
{
    __atomic_store_n(shared, value, __ATOMIC_RELEASE);
}

static inline void shared_store_release64(uint64_t *shared, uint64_t value)
{
    __atomic_store_n(shared, value, __ATOMIC_RELEASE);
}

static inline uint8_t shared_load8(const uint8_t *shared)
{
    return __atomic_load_n(shared, __ATOMIC_RELAXED);
}

/* A byte, with the same promise. */
static inline void shared_store_release8(uint8_t *shared, uint8_t value)
{
    __atomic_store_n(shared, value, __ATOMIC_RELEASE);
}

static inline void shared_store16(uint16_t *shared, uint16_t value)
{
    __atomic_store_n(shared, value, __ATOMIC_RELAXED);
}

/* Between publishing our index and reading the other side's wish to be told:
 * both sides store, then load, so only a full fence keeps one of us awake. */
static inline void shared_fence(void)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* Copy a record out; the compiler may not fetch any of it a second time. */
static inline void shared_copy(void *to, const void *shared, size_t nbytes)
{
    memcpy(to, shared, nbytes);
    __asm__ volatile("" ::: "memory");
}
