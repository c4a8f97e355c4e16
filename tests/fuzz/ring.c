/* Coverage-guided fuzzing of what a guest reaches: rings, descriptor tables, requests, over any memory contents.
 *
 * An input is a setup and a sequence of actions, records of 16 bytes: a mutation changes one of them and leaves the
 * others what they were. Guest memory lies between canaries: ASan sees our own touch of them, their pattern the
 * kernel's. Whatever a request holds is compared with the regions before the device sees it.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>
#include <sanitizer/asan_interface.h>

#include "tests/c/fixture.h"

#define PAGE 4096u
#define ARENA_PAGES 28u
#define REGIONS 3 /* of the guest */
#define INFLIGHT 3
#define LOG 4
#define SPANS 5
#define INFLIGHT_NBYTES 2112u /* of one queue with TRACKED entries of a packed ring */
#define TRACKED 64u /* entries of each queue in the in-flight region */
#define QUEUES 2
#define HELD_MAX 256u
#define ACTIONS_MAX 400
#define CANARY 0xc5
#define LIMIT (1u << 18) /* host offsets stay below it */

struct setup {
    uint8_t size_bits;
    uint8_t flags;
    uint8_t map;
    uint8_t sharing;
    uint32_t disk_sectors;
    uint8_t rest[8];
};
_Static_assert(sizeof(struct setup) == 16, "one record");

enum setup_flag { EVENT_IDX = 1, WRITETHROUGH = 2, READ_ONLY = 4, NO_SYNC_SLOT = 8, NO_MAP = 16, KICKED = 32, FAULTY = 64, BIG_BLOCKS = 128 };
enum sharing { TRACKING = 1, STALE = 2, LOGGING = 4, LOG_BUFFERS = 8, LOG_RINGS = 16, THREADS = 32, PACKED = 64 };

struct action {
    uint8_t verb;
    uint8_t queue;
    uint16_t index;
    uint32_t length;
    uint64_t value;
};
_Static_assert(sizeof(struct action) == 16, "one record");

struct world {
    struct block block; /* first: `begin` gets its device */
    struct worker_counters counters;
    struct worker *worker;
    int control_fd;
    int disk_fd;
    int null_fd; /* reads end at once, writes and syncs fail */
    int kick_fds[QUEUES];
    uint8_t *arena;
    struct guest_region regions[SPANS]; /* those of the guest, then the in-flight region and the dirty log */
    uint32_t present; /* which regions the table holds */
    struct setup setup;
    uint32_t sizes[QUEUES]; /* 0: not started */
    struct vring_avail *available[QUEUES];
    struct vring_desc *table[QUEUES];
    bool is_packed; /* all rings of this input */
    bool wrap[QUEUES]; /* packed: what the driver makes available now, and where it goes */
    uint32_t next[QUEUES];
    uint64_t held[HELD_MAX]; /* requests that are Python's */
    uint32_t held_count;
    uint32_t operations; /* begun and not done */
    uint32_t drained;
};

static struct world world;
static void (*block_begin)(struct device *device, struct worker *worker, struct request *request);
/* What Python's operations read and write; pieces must outlive them. */
static uint8_t scratch[PAGE];
static struct piece pieces[ACTIONS_MAX][3];

/* ---- memory between canaries ---- */

static const struct {
    uint64_t guest_address;
    uint64_t user_address;
    uint64_t nbytes;
    uint32_t page; /* of the arena */
    uint32_t skip;
} PLACES[SPANS] = {
    {0, 0x7f0000000000, 10 * PAGE, 1, 0},                  /* rings lie here */
    {10 * PAGE, 0x600000000000, 2 * PAGE + 24, 13, 8}, /* touches the first in the guest, not here */
    {0x8000000000000000, 0x100000, PAGE + 3, 18, 0},
    {0, 0, QUEUES * INFLIGHT_NBYTES, 22, 0}, /* in flight */
    {0, 0, 3, 25, 0},             /* the log: too short for most of the memory */
};

static void lay_out(void)
{
    world.arena = mmap(NULL, ARENA_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(world.arena != MAP_FAILED);
    memset(world.arena, CANARY, ARENA_PAGES * PAGE);
    __asan_poison_memory_region(world.arena, ARENA_PAGES * PAGE);
    for (int i = 0; i < SPANS; i++) {
        struct guest_region *region = &world.regions[i];

        *region = (struct guest_region){
            .guest_address = PLACES[i].guest_address,
            .user_address = PLACES[i].user_address,
            .nbytes = PLACES[i].nbytes,
            .host = world.arena + PLACES[i].page * PAGE + PLACES[i].skip,
        };
        __asan_unpoison_memory_region(region->host, region->nbytes);
    }
}

/* Read byte by byte what ASan was told to guard. */
__attribute__((no_sanitize("address"))) static void check_canaries(void)
{
    const uint8_t *at = world.arena, *end = world.arena + ARENA_PAGES * PAGE;

    for (int i = 0; i <= SPANS; i++) {
        const uint8_t *stop = i < SPANS ? world.regions[i].host : end;

        for (; at < stop; at++)
            CHECK(*at == CANARY);
        at = i < SPANS ? stop + world.regions[i].nbytes : end;
    }
}

static void set_memory(uint32_t present)
{
    static struct guest_memory memory;

    memset(&memory, 0, sizeof(memory));
    for (int i = 0; i < REGIONS; i++)
        if (present >> i & 1)
            CHECK(guest_memory_add(&memory, &world.regions[i]) == 0);
    worker_set_memory(world.worker, &memory);
    world.present = present;
}

static void put(uint64_t guest_address, const void *bytes, uint64_t nbytes)
{
    static struct guest_memory all;
    struct iovec found[REGIONS];
    int count;

    if (all.count == 0)
        for (int i = 0; i < REGIONS; i++)
            CHECK(guest_memory_add(&all, &world.regions[i]) == 0);
    count = guest_memory_translate(&all, guest_address, nbytes, found, REGIONS);
    for (int i = 0; i < count; i++) {
        memcpy(found[i].iov_base, bytes, found[i].iov_len);
        bytes = (const uint8_t *)bytes + found[i].iov_len;
    }
}

/* An address near something: mostly inside a region, now and then at an edge of one or anywhere. */
static uint64_t address_of(const struct action *action)
{
    uint64_t value = action->value;
    const struct guest_region *region = &world.regions[value >> 62 == 3 ? 2 : value >> 62 == 2];

    switch (value >> 56 & 7) {
    case 0:
        return value << 8 >> 8;
    case 1:
        return region->guest_address + region->nbytes - (value & 31);
    default:
        return region->guest_address + (value & 0xffff) % region->nbytes;
    }
}

/* ---- the device, watched ---- */

static void watched_begin(struct device *device, struct worker *worker, struct request *request)
{
    uint32_t count = request->readable_count + request->writable_count;
    uint64_t nbytes = 0;

    for (uint32_t i = 0; i < count; i++) {
        const struct iovec *piece = &request->pieces[i];
        bool is_inside = false;

        for (int r = 0; r < REGIONS; r++) {
            const struct guest_region *region = &world.regions[r];
            const uint8_t *start = piece->iov_base;
            is_inside |= (world.present >> r & 1) && start >= region->host &&
                         start < region->host + region->nbytes &&
                         piece->iov_len <= (uint64_t)(region->host + region->nbytes - start);
        }
        CHECK(is_inside && piece->iov_len > 0);
        nbytes += piece->iov_len;
    }
    CHECK(nbytes == request->readable_nbytes + request->writable_nbytes);
    block_begin(device, worker, request);
}

/* An image that is fragmented as its context says, and sometimes wrong. */
static void fragmented(void *context, uint64_t guest_offset, uint64_t nbytes, int is_write,
                       struct extent_reader *reader, struct extent *out)
{
    uint8_t kind = *(uint8_t *)context;
    uint64_t cell = guest_offset >> 10;
    uint64_t left = 1024 - guest_offset % 1024;

    *out = (struct extent){
        .kind = EXTENT_DATA, .host_offset = guest_offset % LIMIT, .nbytes = left < nbytes ? left : nbytes};
    switch ((kind + cell * 7) % 11) {
    case 1:
    case 2:
        out->kind = is_write ? EXTENT_PUNT : EXTENT_ZERO;
        break;
    case 3:
        out->kind = EXTENT_PUNT;
        break;
    case 4:
        out->slot = 1; /* a file that takes no writes */
        break;
    case 5:
        out->slot = kind & 128 ? 77 : 0; /* no such file */
        break;
    case 6:
        out->nbytes = kind & 128 ? nbytes + 512 : nbytes;
        break;
    case 7:
        out->nbytes = kind & 128 ? 0 : out->nbytes;
        break;
    default:
        break;
    }
}

/* ---- what Python would do ---- */

static void hold(uint64_t id)
{
    if (world.held_count < HELD_MAX)
        world.held[world.held_count++] = id;
    else
        CHECK(worker_finish(world.worker, id, 0) == 0);
}

static void take_events(int count)
{
    for (int i = 0; i < count; i++) {
        struct worker_event event = worker_events(world.worker)[i];

        switch (event.kind) {
        case EVENT_REQUEST:
            CHECK(event.nbytes <= world.block.size || event.type == VIRTIO_BLK_T_FLUSH);
            hold(event.id);
            break;
        case EVENT_DONE:
            CHECK(world.operations-- > 0);
            break;
        case EVENT_DRAINED:
            world.sizes[event.id] = 0;
            world.drained++;
            break;
        default:
            break;
        }
    }
}

static void turn(void)
{
    bool told = false;

    CHECK(eventfd_write(world.control_fd, 1) == 0);
    while (!told) {
        int count = worker_run(world.worker);

        CHECK(count > 0);
        for (int i = 0; i < count; i++)
            told |= worker_events(world.worker)[i].kind == EVENT_CONTROL;
        take_events(count);
    }
}

/* Until nothing is in flight, as before a region goes. */
static void settle(void)
{
    worker_pause(world.worker, 1);
    do {
        while (world.held_count)
            CHECK(worker_finish(world.worker, world.held[--world.held_count], 0) == 0);
        turn();
    } while (worker_requests_in_flight(world.worker) || world.held_count || world.operations);
    worker_pause(world.worker, 0);
}

static void drain(uint32_t index)
{
    uint32_t before = world.drained;

    CHECK(worker_drain_queue(world.worker, index) == 0);
    while (world.drained == before) {
        while (world.held_count)
            CHECK(worker_finish(world.worker, world.held[--world.held_count], 1) == 0);
        turn();
    }
}

static void finish_one(uint32_t position, uint32_t status)
{
    uint64_t id = world.held[position];

    while (world.operations) /* the engine ends a request after its own transfers */
        turn();
    world.held[position] = world.held[--world.held_count];
    CHECK(worker_finish(world.worker, id, status) == 0);
    CHECK(worker_finish(world.worker, id, status) == -ESTALE);
}

static void *ring_host(uint64_t user_address)
{
    for (int i = 0; i < REGIONS; i++)
        if (user_address - world.regions[i].user_address < world.regions[i].nbytes)
            return world.regions[i].host + (user_address - world.regions[i].user_address);
    return NULL;
}

/* Parts of the ring where the driver library would put them, or anywhere. */
static void start(uint32_t index, const struct action *action)
{
    uint32_t size = action->length >> 16 ? action->length >> 16 : 1u << (action->length & 7);
    const struct guest_region *region = &world.regions[action->value >> 62 == 3];
    uint64_t table = region->user_address + (action->value & 0xffff) % (region->nbytes + 1);
    uint64_t driver = table + (world.is_packed ? 16 * (uint64_t)size : driver_ring_driver_offset(size));
    uint64_t device = world.is_packed ? driver + 4 : table + driver_ring_device_offset(size);
    uint32_t ring_flags = (world.setup.flags & EVENT_IDX) | (world.is_packed ? RING_PACKED : 0);
    uint32_t base = world.is_packed && !action->index ? 0x80008000 : action->index;

    if (action->value >> 16 & 0xffff)
        driver = region->user_address + (action->value >> 16 & 0xffff);
    if (action->value >> 32 & 0xffff)
        device = region->user_address + (action->value >> 32 & 0xffff);
    if (world.sizes[index] || worker_start_queue(world.worker, index, size, table, driver, device, base,
                                                 ring_flags) < 0)
        return;
    world.sizes[index] = size;
    world.table[index] = ring_host(table);
    world.available[index] = ring_host(driver);
    world.next[index] = base & 0x7fff;
    world.wrap[index] = base & 0x8000;
    CHECK(worker_set_kick(world.worker, index, world.setup.flags & KICKED ? dup(world.kick_fds[index]) : -1) == 0);
    CHECK(worker_set_enabled(world.worker, index, true) == 0);
}

/* ---- what the guest would do ---- */

static void post(uint32_t index, uint16_t head)
{
    struct vring_avail *available = world.available[index];

    if (!world.sizes[index] || world.is_packed)
        return;
    available->ring[available->idx & (world.sizes[index] - 1)] = head;
    available->idx++;
}

/* The same where descriptors are made available themselves, one after the other. */
static void post_packed(uint32_t index, uint16_t id, const struct vring_desc *chain, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        uint32_t at = world.next[index] % world.sizes[index];
        uint16_t available = world.wrap[index] ? 1u << VRING_PACKED_DESC_F_AVAIL : 1u << VRING_PACKED_DESC_F_USED;

        world.table[index][at] = chain[i]; /* id is where a split descriptor has its flags, flags where it has next */
        world.table[index][at].flags = id;
        world.table[index][at].next = chain[i].flags | available;
        world.next[index] = at + 1;
        if (world.next[index] == world.sizes[index]) {
            world.next[index] = 0;
            world.wrap[index] = !world.wrap[index];
        }
    }
}

/* A request as a driver posts it, but for its numbers: header, segments, status; in the ring's table or an indirect one. */
static void post_request(uint32_t index, const struct action *action)
{
    uint32_t count = 2 + (action->length & 3), size = world.sizes[index];
    uint64_t header_address = address_of(action), data_address = header_address + 16;
    struct virtio_blk_outhdr header = {action->length >> 8 & 15, 0, action->value >> 16 & 0xffff};
    struct virtio_blk_discard_write_zeroes segment = {header.sector, action->length >> 16, action->length >> 2 & 1};
    bool is_write = header.type != VIRTIO_BLK_T_IN && header.type != VIRTIO_BLK_T_GET_ID;
    bool is_indirect = action->length & 4;
    struct vring_desc chain[5];

    if (!size || (!is_indirect && size < count))
        return;
    put(header_address, &header, sizeof(header));
    chain[0] = (struct vring_desc){header_address, 16, VRING_DESC_F_NEXT, 1};
    for (uint32_t i = 1; i + 1 < count; i++) {
        uint32_t nbytes = segment.num_sectors % 9 * 512 + (action->length & 8 ? 16 : 0);
        chain[i] = (struct vring_desc){data_address, nbytes, VRING_DESC_F_NEXT | (is_write ? 0 : VRING_DESC_F_WRITE), i + 1};
        data_address += nbytes;
    }
    if (header.type == VIRTIO_BLK_T_DISCARD || header.type == VIRTIO_BLK_T_WRITE_ZEROES) {
        chain[1].len = sizeof(segment);
        put(header_address + 16, &segment, sizeof(segment));
    }
    chain[count - 1] = (struct vring_desc){data_address, 1, VRING_DESC_F_WRITE, 0};
    if (is_indirect) {
        if (world.is_packed)
            for (uint32_t i = 0; i < count; i++)
                chain[i].next = chain[i].flags;
        put(9 * PAGE, chain, count * sizeof(*chain));
        if (world.is_packed) {
            struct vring_desc indirect = {9 * PAGE, count * 16, VRING_DESC_F_INDIRECT, 0};
            post_packed(index, action->index, &indirect, 1);
            return;
        }
        world.table[index][action->index % size] = (struct vring_desc){9 * PAGE, count * 16, VRING_DESC_F_INDIRECT, 0};
        post(index, action->index % size);
        return;
    }
    if (world.is_packed) {
        post_packed(index, action->index, chain, count);
        return;
    }
    for (uint32_t i = 0; i < count; i++) {
        uint32_t at = (action->index + i) % size;
        world.table[index][at] = chain[i];
        world.table[index][at].next = (at + 1) % size;
    }
    post(index, action->index % size);
}

static void set_descriptor(uint32_t index, const struct action *action)
{
    struct vring_desc descriptor = {
        .addr = address_of(action),
        .len = action->length & 0x80000000 ? action->length : action->length & 0x3fff,
        .flags = action->length >> 16 & 0x100 ? action->length >> 16 : action->length >> 16 & 7,
        .next = action->length >> 26 ? action->length >> 26 : action->index + 1u,
    };

    if (action->verb & 128)
        put(address_of(action) & ~15ull, &descriptor, sizeof(descriptor));
    else if (world.sizes[index])
        world.table[index][action->index % world.sizes[index]] = descriptor;
}

/* ---- what Python may do with requests it holds ---- */

static void touch(const struct action *action)
{
    uint64_t id, start = action->value & 0xffff, nbytes = action->length % (PAGE + 1);
    int result;

    if (!world.held_count)
        return;
    id = world.held[action->index % world.held_count];
    switch (action->verb >> 6) {
    case 0:
        result = worker_load(world.worker, id, start, scratch, nbytes);
        break;
    case 1:
        result = worker_store(world.worker, id, start, scratch, nbytes);
        break;
    default:
        result = worker_clear(world.worker, id, start, action->length);
        break;
    }
    CHECK(result == 0 || result == -EINVAL);
}

static void transfer(uint32_t number, const struct action *action)
{
    struct piece *own = pieces[number];
    uint64_t id = world.held_count ? world.held[action->index % world.held_count] : 0x100000001;
    uint64_t nbytes = action->length & 0x3fff, offset = action->value >> 32 & (LIMIT - 1);
    uint32_t slot = action->length >> 30 == 3 ? 5 : action->length >> 30 & 1;
    uint32_t flags = action->length >> 28 & 3;
    int result;

    if (action->verb & 128) {
        own[0] = (struct piece){PIECE_HOST, (uintptr_t)scratch, action->value & 511};
        own[1] = (struct piece){id, action->value >> 16 & 0xffff, nbytes};
        own[2] = (struct piece){PIECE_HOST, (uintptr_t)scratch + 512, action->value >> 9 & 63};
        result = worker_transfer_pieces(world.worker, flags, slot, offset, own, 3);
    } else {
        result = worker_transfer(world.worker, flags, slot, offset, id, action->value & 0xffff, nbytes);
    }
    if (result >= 0)
        world.operations++;
}

static void operate(const struct action *action)
{
    int result;

    switch (action->index & 3) {
    case 0:
        result = worker_sync(world.worker, action->length & 1);
        break;
    case 1:
        result = worker_grace(world.worker);
        break;
    default:
        result = worker_zero(world.worker, action->length & 1, action->value & (LIMIT - 1), action->value >> 32 & 0xffff);
    }
    if (result >= 0)
        world.operations++;
}

static void act(uint32_t number, const struct action *action)
{
    uint32_t index = action->queue % QUEUES;

    switch (action->verb % 16) {
    case 0:
    case 1:
        post_request(index, action);
        break;
    case 2:
    case 3:
        set_descriptor(index, action);
        break;
    case 4:
        post(index, action->index);
        break;
    case 5:
        if (action->index & 0x8000) /* the front-end's, where in-flight requests are noted */
            memcpy(world.regions[INFLIGHT].host + (action->value % (world.regions[INFLIGHT].nbytes / 4)) * 4,
                   &action->length, sizeof(action->length));
        else
            put(address_of(action), &action->length, sizeof(action->length));
        break;
    case 6:
        turn();
        break;
    case 7:
        if (world.held_count)
            finish_one(action->index % world.held_count, action->length & 3);
        break;
    case 8:
        touch(action);
        break;
    case 9:
        transfer(number, action);
        break;
    case 10:
        operate(action);
        break;
    case 11:
        drain(index);
        break;
    case 12:
        start(index, action);
        break;
    case 13:
        settle();
        set_memory(action->length & 7);
        break;
    case 14:
        worker_set_enabled(world.worker, index, action->length & 1);
        if (world.available[index] && action->length & 2 && !world.is_packed)
            world.available[index]->idx = action->index;
        eventfd_write(world.kick_fds[index], 1);
        break;
    default:
        world.block.writethrough = action->length & 1;
        world.block.read_only = action->length & 2;
        if (worker_finish(world.worker, action->value, 0) == 0)
            abort(); /* the ids that are held are told by a generation, which no input can know */
    }
}

/* ---- one input ---- */

static void add_file(int fd, int slot)
{
    struct file_traits traits;

    worker_look_at(fd, -1, &traits);
    CHECK(worker_add_file(world.worker, fd, -1, true, &traits) == slot);
}

static void create_worker(void)
{
    int error = 0;

    world.worker = worker_create(&world.block.device, world.control_fd, &world.counters,
                                 world.setup.sharing & THREADS, &error);
    if (!world.worker) /* io_uring is forbidden where we are */
        world.worker = worker_create(&world.block.device, world.control_fd, &world.counters, true, &error);
    CHECK(world.worker);
    add_file(world.disk_fd, 0);
    add_file(world.setup.flags & FAULTY ? world.null_fd : world.disk_fd, 1);
}

static void close_worker(void)
{
    worker_close(world.worker);
    worker_free(world.worker);
    world.worker = NULL;
}

static void init_block(const struct setup *setup)
{
    block_init(&world.block);
    block_begin = world.block.device.begin;
    world.block.device.begin = watched_begin;
    world.block.size = (setup->disk_sectors % (LIMIT / 512) + 1) * 512ull;
    world.block.block_size = setup->flags & BIG_BLOCKS ? 4096 : 512;
    world.block.max_range_sectors = setup->map & 1 ? 0 : 128;
    world.block.writethrough = setup->flags & WRITETHROUGH;
    world.block.read_only = setup->flags & READ_ONLY;
    memcpy(world.block.serial, setup->rest, sizeof(setup->rest));
    if (!(setup->flags & NO_SYNC_SLOT))
        world.block.sync_slot = setup->map >> 1 & 1;
    extent_translate translate = fragmented; /* of that type, before it travels as a number */

    if (!(setup->flags & NO_MAP))
        block_set_extent_map(&world.block, (uintptr_t)translate, (uintptr_t)&world.setup.map, 0);
}

/* The memory that a front-end shares besides the guest's: what is in flight, with or without a past, and the log. */
static void share(const struct setup *setup)
{
    struct guest_region *inflight = &world.regions[INFLIGHT], *log = &world.regions[LOG];
    bool tracks = setup->sharing & TRACKING, logs = setup->sharing & LOGGING;

    CHECK(inflight->nbytes == QUEUES * inflight_nbytes(TRACKED, true));
    memset(inflight->host, 0, inflight->nbytes);
    memset(log->host, 0, log->nbytes);
    for (uint32_t i = 0; setup->sharing & STALE && i < QUEUES; i++) {
        struct inflight_split *past = (void *)(inflight->host + i * inflight_nbytes(TRACKED, world.is_packed));
        uint32_t head = setup->rest[i] % TRACKED;

        past->version = 1;
        past->desc_num = TRACKED;
        past->last_batch_head = setup->rest[2 + i] % (TRACKED + 1);
        past->used_idx = setup->rest[4 + i] & 1;
        past->desc[head] = (struct inflight_split_entry){.inflight = 1, .next = setup->rest[6], .counter = 7};
    }
    CHECK(worker_set_inflight(world.worker, tracks ? inflight->host : NULL, tracks ? QUEUES * inflight_nbytes(TRACKED, world.is_packed) : 0,
                              tracks ? QUEUES : 0) == 0);
    worker_set_log(world.worker, logs ? log : NULL);
    worker_log_buffers(world.worker, setup->sharing & LOG_BUFFERS);
    for (uint32_t i = 0; i < QUEUES; i++)
        worker_log_queue(world.worker, i, setup->sharing & LOG_RINGS, setup->rest[i] * (uint64_t)PAGE);
}

/* A worker is kept for the next input unless a sync has failed in it: that is for good. */
static void open_world(const struct setup *setup)
{
    world.setup = *setup;
    world.is_packed = setup->sharing & PACKED;
    memset(&world.counters, 0, sizeof(world.counters));
    CHECK(ftruncate(world.disk_fd, 0) == 0 && ftruncate(world.disk_fd, LIMIT) == 0);
    for (int i = 0; i < REGIONS; i++)
        memset(world.regions[i].host, 0, world.regions[i].nbytes);
    init_block(setup);
    if (!world.worker)
        create_worker();
    set_memory(7);
    share(setup);
    for (uint32_t i = 0; i < QUEUES; i++) {
        struct action first = {.length = setup->size_bits >> 4 * i & 7, .value = i * 3 * PAGE};

        world.available[i] = NULL;
        world.sizes[i] = 0;
        start(i, &first);
    }
}

static void close_world(void)
{
    settle();
    for (uint32_t i = 0; i < QUEUES; i++)
        drain(i);
    CHECK(world.counters.failed_requests <= world.counters.requests);
    CHECK(worker_set_inflight(world.worker, NULL, 0, 0) == 0);
    worker_set_log(world.worker, NULL);
    if (world.setup.flags & FAULTY)
        close_worker();
}

static void create_world(void)
{
    lay_out();
    world.disk_fd = new_memfd("disk", LIMIT);
    world.null_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    world.control_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    for (int i = 0; i < QUEUES; i++)
        world.kick_fds[i] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
}

/* ---- the fuzzer's entry points ---- */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t nbytes, size_t room, unsigned seed);
size_t LLVMFuzzerMutate(uint8_t *data, size_t nbytes, size_t room);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes)
{
    size_t count = nbytes / sizeof(struct action);
    struct setup setup;

    if (count < 2 || count > ACTIONS_MAX)
        return -1;
    if (!world.arena)
        create_world();
    memcpy(&setup, data, sizeof(setup));
    if (world.worker && (setup.flags & FAULTY || (setup.sharing ^ world.setup.sharing) & THREADS))
        close_worker();
    open_world(&setup);
    for (size_t i = 1; i < count; i++) {
        struct action action;

        memcpy(&action, data + i * sizeof(action), sizeof(action));
        act(i, &action);
    }
    turn();
    close_world();
    check_canaries();
    return 0;
}

/* Whole records are inserted, removed, repeated; else the bytes of one change. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t nbytes, size_t room, unsigned seed)
{
    size_t unit = sizeof(struct action), count = nbytes / unit, at = count ? seed / 8 % count : 0;
    uint8_t *record = data + at * unit;

    nbytes = count * unit;
    if ((count < 2 || seed % 8 == 0) && nbytes + unit <= room) {
        memmove(record + unit, record, nbytes - at * unit);
        if (count < 2 || seed & 8)
            LLVMFuzzerMutate(record, unit, unit);
        return nbytes + unit;
    }
    if (count > 2 && seed % 8 == 1) {
        memmove(record, record + unit, nbytes - (at + 1) * unit);
        return nbytes - unit;
    }
    if (count > 1 && seed % 8 == 2) {
        memcpy(record, data + seed / 64 % count * unit, unit);
        return nbytes;
    }
    LLVMFuzzerMutate(record, unit, unit);
    return nbytes;
}
