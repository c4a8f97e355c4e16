/* Writes to places that have none yet: the bytes, then the name that makes the place the guest's.
 *
 * Where the bytes take a while, as by O_DIRECT or because old ones have to be read from the disk, they are a flight: the
 * map holds the place until they are there, and it is named then. So they are if the name has to wait for a SYNC.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "ring/device.h"
#include "ring/extent.h"

struct flight {
    struct extent_place place;
    struct request_copy copy;
    bool is_synced; /* its bytes are there, and what has to be stable before the name is, or is on its way */
    bool is_here;   /* that is done, the name is yet to be written */
    uint32_t grace; /* who awaits one waits for the landing */
    uint16_t next; /* of the same request, or free: number + 1; 0: none */
};

struct flights {
    struct flight all[EXTENT_HELD];
    uint32_t count; /* under way */
    uint16_t first_free;
};

/* The map that gave the places. */
struct place_map {
    const struct extent_places *places;
    void *context;
};

/* Write nbytes of the request's data from `start` to the place, on this thread. -> 0; -EAGAIN: not now, nothing was
 * written; or how it failed, perhaps in the middle. */
int place_fill(struct worker *worker, struct request *request, const struct extent_place *place, uint64_t start,
               uint64_t nbytes);

/* -> 0 or how it failed. */
int place_name(struct worker *worker, const struct extent_place *place);

void flights_init(struct flights *flights);

/* Whether what place_fill would not write now may fly, and be named on this thread after. */
bool flight_suits(struct worker *worker, const struct extent_place *place, uint64_t nbytes);

/* Hold the place, of which one more is free, until device->end has come after all parts of the request. */
struct flight *flight_begin(struct flights *flights, struct place_map map, struct worker *worker,
                            struct request *request, const struct extent_place *place);

/* Begin to write what place_fill would have. */
void flight_fill(struct worker *worker, struct request *request, const struct flight *flight, uint64_t start,
                 uint64_t nbytes);

/* What flights ended with. */
struct landing {
    bool gave_up; /* some have no name: only Python can write what belongs there */
    bool failed;  /* the image takes no more writes */
    bool waits;   /* a name is in memory */
    bool goes_on; /* this thread may not write some names: flights_name */
};

/* The request's bytes are written. -> the file that has to be synced before places are named: device->end comes again
 * after that, and then there is none, EXTENT_NO_SLOT. */
uint32_t flights_to_sync(struct flights *flights, const struct request *request);

/* The request's parts have ended, or the write of a name, as `result` says: name its places, or give them up. */
struct landing flights_land(struct flights *flights, struct place_map map, struct worker *worker,
                            struct request *request, int result);

/* Begin to write a name that is left; flights_land comes again after it. One at a time: each has an outcome of its own. */
void flights_name(struct flights *flights, struct worker *worker, struct request *request);
