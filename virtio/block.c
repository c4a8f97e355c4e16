#include "virtio/block.h"

#include <errno.h>
#include <linux/virtio_blk.h>
#include <stddef.h>
#include <string.h>

#include "ring/assertion.h"
#include "ring/pieces.h"

#define SECTOR 512u
#define WAITING_MAX 256u /* who comes then is Python's: all may come to be at once, and its events have an end */
#define FLUSH_OUT 5u /* a FLUSH of legacy drivers, virtio 0.9.5 */
#define TRANSFER_NBYTES_MAX INT32_MAX /* as QEMU: one request must not hold up a drain for minutes */

_Static_assert(sizeof(struct virtio_blk_outhdr) == 16, "5.2.6");
_Static_assert(sizeof(struct virtio_blk_discard_write_zeroes) == 16, "5.2.6");

static struct block *block_of(struct device *device)
{
    return (struct block *)device;
}

/* No success may hide that a write to the image or a sync has failed. */
static bool takes_no_writes(const struct block *block, const struct worker *worker)
{
    return block->failed ||
           (worker_has_slot(worker, block->sync_slot) && worker_slot_failed(worker, block->sync_slot)) ||
           (worker_has_slot(worker, block->names_slot) && worker_slot_failed(worker, block->names_slot));
}

static void trace(const struct block *block, struct worker *worker, struct request *request)
{
    if (worker->trace)
        request_trace(worker, request, block->writethrough ? TRACE_WRITETHROUGH : 0);
}

/* Copy a record out of the request. -> false: its memory is gone. */
static bool load(struct worker *worker, const struct request *request, uint64_t start, void *record, uint64_t nbytes)
{
    pieces_load(request->pieces, start, nbytes, record);
    return !pieces_have_lost(worker, request->pieces, start, nbytes);
}

/* ---- the end of a request ---- */

static void answer(struct worker *worker, struct request *request, uint8_t status, uint64_t data_nbytes)
{
    uint64_t nbytes = data_nbytes + 1;

    if (worker->trace && request->traced)
        request_trace_answer(worker, request, status);
    if (status != VIRTIO_BLK_S_OK)
        worker->counters->failed_requests++;
    *request->status = status;
    request_complete(worker, request, nbytes < UINT32_MAX ? (uint32_t)nbytes : UINT32_MAX);
}

enum { NOT_SYNCED = 0, SYNCED, SYNCED_NAMES };

/* Wait until all that completed is stable. Whoever comes to that in the same round shares what Python does. */
static void commit(struct block *block, struct worker *worker, struct request *request)
{
    ASSERT(request->state == REQUEST_BUSY && !request->parts && !request->synced);
    if (block->holds_commits) {
        line_join(&block->held, &request->waiter);
        request_park(worker, request);
        return;
    }
    request->synced = SYNCED;
    if (!block->flush_punts) {
        request_sync(worker, request, block->sync_slot);
    } else if (block->flushing && block->flushing_since == worker->round) {
        line_join(&block->flushing->followers, &request->waiter);
    } else {
        block->flushing = request;
        block->flushing_since = worker->round;
        request_punt(worker, request, VIRTIO_BLK_T_FLUSH);
    }
}

/* The data is stable: wait for what leads to it, if that is in a file of its own and not stable. -> whether it waits */
static bool commit_names(struct block *block, struct worker *worker, struct request *request)
{
    if (request->synced != SYNCED || !worker_has_slot(worker, block->names_slot) ||
        worker_slot_is_stable(worker, block->names_slot))
        return false;
    request->synced = SYNCED_NAMES;
    request_sync(worker, request, block->names_slot);
    return true;
}

static bool modifies(const struct request *request)
{
    return request->type == VIRTIO_BLK_T_OUT || request->type == VIRTIO_BLK_T_DISCARD ||
           request->type == VIRTIO_BLK_T_WRITE_ZEROES;
}

static void finish(struct block *block, struct worker *worker, struct request *request, int result)
{
    for (struct waiter *waiter; (waiter = line_leave(&request->followers));)
        finish(block, worker, waiter->request, result);
    if (request == block->flushing)
        block->flushing = NULL;
    if (result == 0 && request->type != VIRTIO_BLK_T_IN && takes_no_writes(block, worker))
        result = -EIO;
    if (result != 0) {
        answer(worker, request, result > 0 ? result : VIRTIO_BLK_S_IOERR, 0);
        return;
    }
    if (block->writethrough && modifies(request) && !request->synced && worker_has_slot(worker, block->sync_slot)) {
        commit(block, worker, request);
        return;
    }
    if (commit_names(block, worker, request))
        return;
    if (request->type == VIRTIO_BLK_T_IN)
        worker->counters->read_bytes += request->nbytes;
    else if (request->type == VIRTIO_BLK_T_OUT)
        worker->counters->written_bytes += request->nbytes;
    answer(worker, request, VIRTIO_BLK_S_OK, request->type == VIRTIO_BLK_T_IN ? request->nbytes : 0);
}

/* ---- reads and writes ---- */

/* Find every extent of the request, without starting anything. -> their number, 0: only Python can serve it. */
static int resolve(const struct block *block, struct worker *worker, const struct request *request,
                   struct extent *extents)
{
    struct table_reader tables = worker_table_reader(worker);
    bool is_write = request->type == VIRTIO_BLK_T_OUT;
    uint64_t done = 0;

    for (int count = 0; count < WORKER_TRANSFERS_MIN;) {
        struct extent *extent = &extents[count];
        uint64_t left = request->nbytes - done;

        block->translate(block->context, request->offset + done, left, is_write, &tables.reader, extent);
        if (extent->nbytes == 0 || extent->nbytes > left)
            return 0;
        if (extent->kind == EXTENT_FRESH ? !block->places || !is_write
                                         : extent->kind != EXTENT_DATA && (extent->kind != EXTENT_ZERO || is_write))
            return 0;
        if (extent->kind == EXTENT_DATA && !worker_has_slot(worker, extent->slot))
            return 0;
        done += extent->nbytes;
        count++;
        if (done == request->nbytes)
            return count;
    }
    return 0;
}

static void serve(struct worker *worker, struct request *request, const struct extent *extents, int count)
{
    bool is_write = request->type == VIRTIO_BLK_T_OUT;
    uint64_t start = 0;

    for (int i = 0; i < count; start += extents[i++].nbytes) {
        if (extents[i].kind == EXTENT_FRESH)
            continue; /* done */
        if (extents[i].kind == EXTENT_ZERO)
            pieces_clear(request->data, start, extents[i].nbytes);
        else
            request_transfer(worker, request, is_write, &extents[i], start);
    }
}

/* What is left to do of a request when its parts have ended. */
enum then { THEN_END = 0, THEN_PUNT, THEN_WAIT };

/* Once a name is in memory alone, a SYNC of the file is no FLUSH. */
static int name_place(struct block *block, struct worker *worker, const struct extent_place *place)
{
    int result = place_name(worker, place);

    if (result == 0 && place->memory)
        block->flush_punts = true;
    return result;
}

static struct place_map map_of(const struct block *block)
{
    return (struct place_map){block->places, block->context};
}

/* The name waits for a SYNC, which begins when all bytes of the request are written: a flight in any case. */
static enum then write_before_sync(struct block *block, struct worker *worker, struct request *request,
                                   const struct extent_place *place, uint64_t start, uint64_t nbytes)
{
    bool has_room = block->flights.first_free;
    struct flight *flight;
    int result;

    if (!has_room || !flight_suits(worker, place, nbytes)) {
        block->places->conclude(block->context, place, EXTENT_UNTOUCHED, 0);
        return has_room ? THEN_PUNT : THEN_WAIT;
    }
    result = place_fill(worker, request, place, start, nbytes);
    if (result < 0 && result != -EAGAIN) {
        block->places->conclude(block->context, place, EXTENT_SPOILED, 0);
        return THEN_PUNT;
    }
    flight = flight_begin(&block->flights, map_of(block), worker, request, place);
    if (result < 0)
        flight_fill(worker, request, flight, start, nbytes);
    return THEN_END;
}

/* Write nbytes from `start` of the request where nothing is yet: the bytes, then what makes them the guest's. One
 * sequence on this thread, so nothing is ever half done when somebody else looks; or a flight, whose place is held. */
static enum then write_fresh(struct block *block, struct worker *worker, struct request *request, uint64_t start,
                             uint64_t nbytes)
{
    const struct extent_places *places = block->places;
    struct extent_place place;
    int result = places->take(block->context, request->offset + start, nbytes, block->writethrough, &place);
    struct flight *flight;

    if (result < 0)
        return result == -EBUSY ? THEN_WAIT : THEN_PUNT;
    if (place.after_sync)
        return write_before_sync(block, worker, request, &place, start, nbytes);
    result = place_fill(worker, request, &place, start, nbytes);
    if (result == -EAGAIN && flight_suits(worker, &place, nbytes)) {
        if (!block->flights.first_free) {
            places->conclude(block->context, &place, EXTENT_UNTOUCHED, 0);
            return THEN_WAIT;
        }
        flight = flight_begin(&block->flights, map_of(block), worker, request, &place);
        flight_fill(worker, request, flight, start, nbytes);
        return THEN_END;
    }
    if (result < 0) {
        places->conclude(block->context, &place, result == -EAGAIN ? EXTENT_UNTOUCHED : EXTENT_SPOILED, 0);
        return THEN_PUNT;
    }
    result = name_place(block, worker, &place);
    if (places->conclude(block->context, &place, result < 0 ? EXTENT_SPOILED : EXTENT_NAMED, result) < 0)
        block->failed = true;
    return result == 0 ? THEN_END : THEN_PUNT;
}

/* If a part that has no place yet cannot have one, all of the request is written anew: by Python, or later. */
static enum then write_all_fresh(struct block *block, struct worker *worker, struct request *request,
                                 const struct extent *extents, int count)
{
    enum then then = THEN_END;
    uint64_t start = 0;

    for (int i = 0; i < count && then == THEN_END; start += extents[i++].nbytes)
        if (extents[i].kind == EXTENT_FRESH)
            then = write_fresh(block, worker, request, start, extents[i].nbytes);
    return then;
}

/* Whether somebody wants to know of each change, or still wants a part of the request's range, which is not empty. */
static bool is_watched(const struct block *block, const struct request *request)
{
    uint64_t chunk = request->offset >> BLOCK_FROZEN_BITS;
    uint64_t end = ((request->offset + request->nbytes - 1) >> BLOCK_FROZEN_BITS) + 1;

    if (block->changes_punt)
        return true;
    for (end = end < block->nfrozen ? end : block->nfrozen; chunk < end; chunk++) {
        uint8_t bits = block->frozen[chunk / 8];

        if (bits >> chunk % 8 & 1)
            return true;
        if (!bits)
            chunk |= 7;
    }
    return false;
}

static void begin_transfer(struct block *block, struct worker *worker, struct request *request)
{
    struct extent extents[WORKER_TRANSFERS_MIN];
    bool is_punted = !block->translate || (request->type == VIRTIO_BLK_T_OUT && is_watched(block, request));
    int count = is_punted ? 0 : resolve(block, worker, request, extents);

    request->error = 0;
    request_hold(request);
    request->then = count ? write_all_fresh(block, worker, request, extents, count) : THEN_PUNT;
    if (request->then == THEN_END)
        serve(worker, request, extents, count);
    request_release(worker, request, 0);
}

static void await_flight(struct block *block, struct request *request)
{
    line_join(&block->waiting, &request->waiter);
    block->nwaiting++;
}

/* Begin those anew that waited for a flight to end. Ends of flights in the midst of that leave it to whoever began. */
static void wake(struct block *block, struct worker *worker)
{
    if (block->waking || !block->waiting.first)
        return;
    block->waking = true;
    do {
        struct line ready;

        line_init(&ready);
        line_move(&ready, &block->waiting);
        block->nwaiting = 0;
        for (struct waiter *waiter; (waiter = line_leave(&ready));) {
            if (!block->flights.first_free) /* it and those behind it would come here again */
                await_flight(block, waiter->request);
            else if (worker_has_operations(worker))
                begin_transfer(block, worker, waiter->request);
            else
                request_punt(worker, waiter->request, waiter->request->type);
        }
    } while (block->waiting.first && !block->flights.count);
    block->waking = false;
}

/* A step of the request's flights has ended, as `result` says: begin the next one. -> false: that was the last */
static bool flies_on(struct block *block, struct worker *worker, struct request *request, int result)
{
    uint32_t slot = result == 0 ? flights_to_sync(&block->flights, request) : EXTENT_NO_SLOT;
    struct landing landing;

    if (slot != EXTENT_NO_SLOT) {
        request_sync(worker, request, slot);
        return true;
    }
    landing = flights_land(&block->flights, map_of(block), worker, request, result);
    block->failed |= landing.failed;
    block->flush_punts |= landing.waits;
    if (landing.gave_up)
        request->then = THEN_PUNT; /* not anew: what fails for good would never end */
    if (!landing.goes_on)
        return false;
    request->error = 0;
    request_hold(request);
    flights_name(&block->flights, worker, request);
    request_release(worker, request, 0);
    return true;
}

/* All parts of the request have ended: its transfers, its sync, or Python's. */
static void end(struct device *device, struct worker *worker, struct request *request, int result)
{
    struct block *block = block_of(device);
    bool flew = request->flight;
    enum then then;

    ASSERT(request->state == REQUEST_BUSY && !request->parts);
    if (flew && flies_on(block, worker, request, result))
        return;
    then = request->then;
    request->then = THEN_END;
    if (then == THEN_END)
        finish(block, worker, request, result);
    else if (then == THEN_WAIT && block->nwaiting < WAITING_MAX)
        await_flight(block, request);
    else
        request_punt(worker, request, request->type);
    if (!block->flights.count || flew)
        wake(block, worker);
}

/* Whole logical blocks, thus whole sectors, of this disk. */
static bool is_inside(const struct block *block, uint64_t offset, uint64_t nbytes)
{
    return !(offset & (block->block_size - 1)) && !(nbytes & (block->block_size - 1)) && offset <= block->size &&
           nbytes <= block->size - offset;
}

/* -> the offset in bytes; UINT64_MAX, which no disk holds, if there is no such number. */
static uint64_t sector_offset(uint64_t sector)
{
    uint64_t offset;
    return __builtin_mul_overflow(sector, (uint64_t)SECTOR, &offset) ? UINT64_MAX : offset;
}

/* Nothing of its data was touched, however much that is. */
static void refuse(struct worker *worker, struct request *request)
{
    request->nbytes = 0;
    answer(worker, request, VIRTIO_BLK_S_IOERR, 0);
}

static void transfer(struct block *block, struct worker *worker, struct request *request, uint64_t sector)
{
    bool is_write = request->type == VIRTIO_BLK_T_OUT;

    request->offset = sector_offset(sector);
    if (is_write && (block->read_only || takes_no_writes(block, worker))) {
        refuse(worker, request);
    } else if (request->nbytes > TRANSFER_NBYTES_MAX || !is_inside(block, request->offset, request->nbytes)) {
        refuse(worker, request);
    } else if (request->nbytes == 0) {
        answer(worker, request, VIRTIO_BLK_S_OK, 0);
    } else {
        if (is_write)
            trace(block, worker, request);
        begin_transfer(block, worker, request);
    }
}

/* ---- the other types ---- */

static void begin_flush(struct block *block, struct worker *worker, struct request *request)
{
    if (takes_no_writes(block, worker)) {
        answer(worker, request, VIRTIO_BLK_S_IOERR, 0);
    } else if (worker_has_slot(worker, block->sync_slot)) {
        commit(block, worker, request);
    } else {
        request_punt(worker, request, request->type);
    }
}

static void flush(struct block *block, struct worker *worker, struct request *request)
{
    worker->counters->flushes++;
    trace(block, worker, request);
    begin_flush(block, worker, request);
}

void block_hold_commits(struct block *block)
{
    block->holds_commits = true;
}

void block_begin_commits(struct block *block, struct worker *worker)
{
    block->holds_commits = false;
    for (struct waiter *waiter; (waiter = line_leave(&block->held));) {
        request_take_up(worker, waiter->request);
        begin_flush(block, worker, waiter->request);
    }
}

static void get_id(const struct block *block, struct worker *worker, struct request *request)
{
    uint64_t room = request->writable_nbytes - 1;

    request->data = request->pieces + request->readable_count;
    request->nbytes = room < BLOCK_SERIAL_NBYTES ? room : BLOCK_SERIAL_NBYTES;
    pieces_store(request->data, 0, request->nbytes, block->serial);
    answer(worker, request, VIRTIO_BLK_S_OK, request->nbytes);
}

/* -> the status that a discard or write-zeroes deserves before it is begun. */
static uint8_t check_segment(const struct block *block, const struct request *request,
                             const struct virtio_blk_discard_write_zeroes *segment)
{
    uint32_t flags = request->type == VIRTIO_BLK_T_WRITE_ZEROES ? VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP : 0;

    if (segment->flags & ~flags)
        return VIRTIO_BLK_S_UNSUPP;
    if (block->read_only || segment->num_sectors > block->max_range_sectors ||
        !is_inside(block, sector_offset(segment->sector), (uint64_t)segment->num_sectors * SECTOR))
        return VIRTIO_BLK_S_IOERR;
    return VIRTIO_BLK_S_OK;
}

/* Let the map see to it that the request's range reads as zeros. -> false: only Python can. */
static bool clear_at_once(struct block *block, struct worker *worker, const struct request *request)
{
    struct table_writer tables = worker_table_writer(worker);
    enum extent_clearing how = EXTENT_DISCARD;
    int result;

    if (!block->places || is_watched(block, request))
        return false;
    if (request->type == VIRTIO_BLK_T_WRITE_ZEROES)
        how = request->flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP ? EXTENT_UNMAP : EXTENT_KEEP;
    result = block->places->clear(block->context, request->offset, request->nbytes, how, &tables.writer);
    if (result < 0 && result != -EAGAIN)
        block->failed = true;
    return result == 0;
}

static void clear_range(struct block *block, struct worker *worker, struct request *request)
{
    struct virtio_blk_discard_write_zeroes segment;
    uint64_t payload = request->readable_nbytes - sizeof(struct virtio_blk_outhdr);
    uint8_t status = VIRTIO_BLK_S_UNSUPP;

    if (block->max_range_sectors && payload < sizeof(segment)) {
        status = VIRTIO_BLK_S_IOERR;
    } else if (block->max_range_sectors && payload == sizeof(segment)) {
        status = load(worker, request, sizeof(struct virtio_blk_outhdr), &segment, sizeof(segment))
                     ? check_segment(block, request, &segment)
                     : VIRTIO_BLK_S_IOERR;
    }
    if (status == VIRTIO_BLK_S_OK && takes_no_writes(block, worker))
        status = VIRTIO_BLK_S_IOERR;
    if (status != VIRTIO_BLK_S_OK || segment.num_sectors == 0) {
        answer(worker, request, status, 0);
        return;
    }
    request->flags = segment.flags;
    request->offset = sector_offset(segment.sector);
    request->nbytes = (uint64_t)segment.num_sectors * SECTOR;
    trace(block, worker, request);
    if (clear_at_once(block, worker, request))
        finish(block, worker, request, 0);
    else
        request_punt(worker, request, request->type);
}

/* ---- parsing ---- */

/* Take the status byte off the end of the writable pieces. */
static void take_status(struct request *request)
{
    struct iovec *last = &request->pieces[request->readable_count + request->writable_count - 1];

    request->status = (uint8_t *)last->iov_base + last->iov_len - 1;
}

/* Point `data` at what follows the header; pieces before it are gone for good. */
static void skip_header(struct request *request)
{
    uint64_t skip = sizeof(struct virtio_blk_outhdr);
    struct iovec *piece = request->pieces;

    for (; skip && skip >= piece->iov_len; piece++)
        skip -= piece->iov_len;
    if (skip) {
        piece->iov_base = (uint8_t *)piece->iov_base + skip;
        piece->iov_len -= skip;
    }
    request->data = piece;
}

static void dispatch(struct block *block, struct worker *worker, struct request *request, uint64_t sector)
{
    switch (request->type) {
    case VIRTIO_BLK_T_IN:
        worker->counters->reads++;
        request->data = request->pieces + request->readable_count;
        request->nbytes = request->writable_nbytes - 1;
        transfer(block, worker, request, sector);
        break;
    case VIRTIO_BLK_T_OUT:
        worker->counters->writes++;
        skip_header(request);
        request->nbytes = request->readable_nbytes - sizeof(struct virtio_blk_outhdr);
        transfer(block, worker, request, sector);
        break;
    case FLUSH_OUT:
        request->type = VIRTIO_BLK_T_FLUSH;
        flush(block, worker, request);
        break;
    case VIRTIO_BLK_T_FLUSH:
        flush(block, worker, request);
        break;
    case VIRTIO_BLK_T_GET_ID:
        worker->counters->other_requests++;
        get_id(block, worker, request);
        break;
    case VIRTIO_BLK_T_DISCARD:
        worker->counters->discards++;
        clear_range(block, worker, request);
        break;
    case VIRTIO_BLK_T_WRITE_ZEROES:
        worker->counters->write_zeroes++;
        clear_range(block, worker, request);
        break;
    default:
        worker->counters->other_requests++;
        answer(worker, request, VIRTIO_BLK_S_UNSUPP, 0);
    }
}

static void begin(struct device *device, struct worker *worker, struct request *request)
{
    struct virtio_blk_outhdr header;

    if (request->writable_nbytes == 0) {
        worker->counters->other_requests++;
        worker->counters->failed_requests++;
        request_complete(worker, request, 0);
        return;
    }
    take_status(request);
    if (request->readable_nbytes < sizeof(header) || !load(worker, request, 0, &header, sizeof(header))) {
        worker->counters->other_requests++;
        answer(worker, request, VIRTIO_BLK_S_IOERR, 0);
        return;
    }
    request->type = header.type & ~VIRTIO_BLK_T_BARRIER;
    dispatch(block_of(device), worker, request, header.sector);
}

void block_init(struct block *block)
{
    *block = (struct block){
        .device = {.begin = begin, .end = end},
        .block_size = SECTOR,
        .sync_slot = BLOCK_NO_SLOT,
        .names_slot = BLOCK_NO_SLOT,
    };
    flights_init(&block->flights);
    line_init(&block->waiting);
    line_init(&block->held);
}

void block_set_extent_map(struct block *block, uintptr_t translate_address, uintptr_t context_address,
                          uintptr_t places_address)
{
    block->translate = (extent_translate)translate_address;
    block->context = (void *)context_address;
    block->places = (const struct extent_places *)places_address;
}
