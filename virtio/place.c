#include "virtio/place.h"

#include <errno.h>
#include <stddef.h>

#include "ring/assertion.h"

static struct request_copy copy_of(const struct extent_place *place)
{
    return (struct request_copy){
        .slot = place->slot,
        .old_slot = place->old_slot,
        .host_offset = place->host_offset - place->ahead,
        .old_offset = place->old_offset,
        .nbytes = place->old_nbytes,
        .ahead = place->ahead,
        .cipher = place->cipher,
        .old_cipher = place->old_cipher,
    };
}

static bool names_at_once(struct worker *worker, const struct extent_place *place)
{
    return place->memory || worker_is_near(worker, place->name_slot);
}

int place_fill(struct worker *worker, struct request *request, const struct extent_place *place, uint64_t start,
               uint64_t nbytes)
{
    struct request_copy copy = copy_of(place);

    if (!place->after_sync && !names_at_once(worker, place))
        return -EAGAIN; /* it is named right after, on this thread */
    if (place->old_nbytes)
        return request_copy_at_once(worker, request, &copy, start, nbytes);
    return request_write_at_once(worker, request, place->slot, place->host_offset, start, nbytes);
}

int place_name(struct worker *worker, const struct extent_place *place)
{
    if (!place->memory)
        return worker_write_entry(worker, place->name_slot, place->name_offset, place->name, place->name_nbytes);
    worker_store_memory(worker, place->memory, place->name_offset, place->name, place->name_nbytes);
    return worker_write_word(worker, place->name_slot, place->mark_offset, place->mark, sizeof(place->mark));
}

/* ---- flights ---- */

void flights_init(struct flights *flights)
{
    *flights = (struct flights){.first_free = 1};
    for (uint16_t i = 0; i + 1 < EXTENT_HELD; i++)
        flights->all[i].next = i + 2;
}

/* More than the request's bytes are written. */
static bool is_copy(const struct extent_place *place, uint64_t nbytes)
{
    return place->old_nbytes > nbytes;
}

static bool may_copy(const struct worker *worker, const struct extent_place *place)
{
    return place->old_nbytes <= REQUEST_COPY_NBYTES &&
           (place->old_slot == EXTENT_NO_SLOT || worker_has_slot(worker, place->old_slot));
}

bool flight_suits(struct worker *worker, const struct extent_place *place, uint64_t nbytes)
{
    return worker_has_slot(worker, place->slot) && worker_has_slot(worker, place->name_slot) &&
           (!names_at_once(worker, place) || worker_allows_entry(worker, place->name_slot, place->name_nbytes)) &&
           (!is_copy(place, nbytes) || may_copy(worker, place));
}

struct flight *flight_begin(struct flights *flights, struct place_map map, struct worker *worker,
                            struct request *request, const struct extent_place *place)
{
    uint16_t number = flights->first_free;
    struct flight *flight = &flights->all[number - 1];

    ASSERT(number && request->parts);
    flights->first_free = flight->next;
    flights->count++;
    flight->place = *place;
    flight->copy = copy_of(place);
    flight->is_synced = flight->is_here = false;
    flight->grace = worker_join_grace(worker);
    flight->next = request->flight;
    request->flight = number;
    map.places->hold(map.context, place);
    return flight;
}

void flight_fill(struct worker *worker, struct request *request, const struct flight *flight, uint64_t start,
                 uint64_t nbytes)
{
    struct extent extent = {
        .kind = EXTENT_DATA,
        .slot = flight->place.slot,
        .host_offset = flight->place.host_offset,
        .nbytes = nbytes,
        .cipher = flight->place.cipher,
    };

    if (is_copy(&flight->place, nbytes))
        request_copy(worker, request, &flight->copy, start, nbytes);
    else
        request_transfer(worker, request, true, &extent, start);
}

uint32_t flights_to_sync(struct flights *flights, const struct request *request)
{
    uint32_t slot = EXTENT_NO_SLOT;

    for (uint16_t number = request->flight; number; number = flights->all[number - 1].next) {
        struct flight *flight = &flights->all[number - 1];

        if (flight->place.after_sync && !flight->is_synced)
            slot = flight->place.slot;
        flight->is_synced = true;
    }
    return slot;
}

/* It ends: `result` is of the place, `error` of its name, if that was written. */
static void end(struct place_map map, struct worker *worker, const struct flight *flight, int result, int error,
                struct landing *landing)
{
    const struct extent_place *place = &flight->place;
    enum extent_outcome outcome = result < 0 ? EXTENT_SPOILED : EXTENT_NAMED;

    landing->failed |= map.places->conclude(map.context, place, outcome, error) < 0;
    landing->gave_up |= result < 0;
    landing->waits |= result == 0 && place->memory;
    worker_leave_grace(worker, flight->grace);
}

/* The bytes are there, or not: name the place, or give it up. -> whether its name is yet to be written */
static bool land(struct place_map map, struct worker *worker, struct flight *flight, int result,
                 struct landing *landing)
{
    int error = 0;

    if (result == 0)
        result = map.places->find(map.context, &flight->place);
    flight->is_here = result == 0 && !names_at_once(worker, &flight->place);
    if (flight->is_here)
        return true;
    if (result == 0)
        result = error = place_name(worker, &flight->place);
    end(map, worker, flight, result, error, landing);
    return false;
}

static struct flight *leave(struct flights *flights, struct request *request, uint16_t *list)
{
    uint16_t number = request->flight;
    struct flight *flight = &flights->all[number - 1];

    request->flight = flight->next;
    flight->next = *list;
    *list = number;
    return flight;
}

static void land_all(struct flights *flights, struct place_map map, struct worker *worker, struct request *request,
                     int result, struct landing *landing)
{
    uint16_t left = 0;

    while (request->flight) {
        bool is_left = land(map, worker, &flights->all[request->flight - 1], result, landing);

        flights->count -= !is_left;
        leave(flights, request, is_left ? &left : &flights->first_free);
    }
    request->flight = left;
}

struct landing flights_land(struct flights *flights, struct place_map map, struct worker *worker,
                            struct request *request, int result)
{
    struct landing landing = {0};

    if (flights->all[request->flight - 1].is_here) {
        const struct flight *flight = leave(flights, request, &flights->first_free);

        end(map, worker, flight, result, result == -ECANCELED ? 0 : result, &landing);
        flights->count--;
        result = 0; /* the others wait for their names */
    }
    land_all(flights, map, worker, request, result, &landing);
    landing.goes_on = request->flight;
    return landing;
}

void flights_name(struct flights *flights, struct worker *worker, struct request *request)
{
    const struct extent_place *place = &flights->all[request->flight - 1].place;

    request_write_entry(worker, request, place->name_slot, place->name_offset, place->name, place->name_nbytes);
}
