/* A load on a block device: keeps `depth` requests in flight on each queue, sleeps on the call as a guest does.
 *
 * One thread drives all queues; they share one call eventfd, as interrupts may
 * be shared. Memory for the requests is the caller's.
 */
#pragma once

#include <stdint.h>

#include "bench/histogram.h"
#include "bench/driver.h"

enum load_kind { LOAD_READ, LOAD_WRITE, LOAD_FLUSH, LOAD_DISCARD, LOAD_WRITE_ZEROES, LOAD_KINDS };

struct load_queue {
    struct driver_ring *ring; /* borrowed */
    int kick_fd;
};

struct load_job {
    uint32_t kind;         /* LOAD_WRITE, LOAD_DISCARD or LOAD_WRITE_ZEROES: what is not a read */
    uint32_t read_percent; /* of the requests */
    uint32_t block_size;   /* bytes, a multiple of 512 */
    uint32_t depth;        /* requests in flight on each queue */
    uint32_t queue_count;
    uint32_t order; /* enum pattern_order */
    uint32_t stride;
    uint32_t flush_every; /* writes; 0: never */
    uint64_t start;       /* guest offset, bytes */
    uint64_t nbytes;
    uint64_t seed;
    int verify;
    int indirect; /* chains go through indirect tables, as Linux's do */
    int call_fd;
    int hangup_fd; /* the socket: readable when the device has gone */
};

struct load_counts {
    uint64_t completed[LOAD_KINDS];
    uint64_t failed;  /* a status other than OK */
    uint64_t corrupt; /* reads that returned what they must not */
    uint64_t kicks;
    uint64_t sleeps;
    uint64_t nanoseconds; /* from the reset to the last completion */
    struct histogram latencies[LOAD_KINDS]; /* nanoseconds */
};

struct load;

/* Bytes of guest memory a job needs, at an address aligned to 4096. */
uint64_t load_memory_nbytes(const struct load_job *job);

/* -> NULL if there is no memory. `host` is our address of `guest_address`. */
struct load *load_create(const struct load_job *job, const struct load_queue *queues, uint8_t *host,
                         uint64_t guest_address);
void load_destroy(struct load *load);

/* Forget what was counted so far; requests in flight go on. */
void load_reset(struct load *load);

/* Drive the load for a while. -> 1 everything was visited and is done, 0 the time is up,
 * -EPIPE the device has gone, -ETIMEDOUT it completed nothing for long, -EPROTO its used ring is nonsense. */
int load_run(struct load *load, uint64_t nanoseconds);

/* Submit nothing more and wait for what is in flight. Same errors. */
int load_drain(struct load *load);

/* Borrowed until load_destroy. */
const struct load_counts *load_counts(const struct load *load);
