/* One worker: the queues of a device, an io_uring, and the loop between them.
 *
 * Everything here runs on the worker's own thread. A device parses each popped
 * chain, then transfers, joins a sync, completes, or hands the request to
 * Python. Python sees batches of events and begins operations of its own.
 *
 * Here are the records, and what Python calls. What a device calls stands in ring/device.h, what the worker's own
 * files call of one another in ring/inside.h.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "ring/assertion.h"
#include "ring/counters.h"
#include "ring/counters.h"
#include "ring/extent.h"
#include "ring/histogram.h"
#include "ring/host.h"
#include "ring/log.h"
#include "ring/loss.h"
#include "ring/memory.h"
#include "ring/pace.h"
#include "ring/poll.h"
#include "ring/storage.h"
#include "ring/trace.h"
#include "ring/uring.h"
#include "ring/virtqueue.h"

#define WORKER_QUEUES 256 /* a vring index is 8 bits on the vhost-user wire */
#define WORKER_FILES 256
#define WORKER_OPERATIONS 2048
#define WORKER_EVENTS 4096
#define WORKER_TRANSFERS_MIN 16 /* operations a device may begin for one request; fetching waits for so many */
#define WORKER_ASIDE (WORKER_TRANSFERS_MIN + EXTENT_HELD) /* and leaves one for each place that is held: its name */
#define WORKER_TABLES 16 /* reads on this thread that an extent map may ask for to translate one request */
#define WORKER_BUSY_NBYTES (1ull << 30) /* fetching waits while requests hold so much: drains end in time */
#define WORKER_AT_ONCE 256 /* see worker.at_once */
#define IDLE_BOUNCES 16 /* buffers that are kept: faulting one in costs more than encrypting what it holds */
#define INLINE_PIECES 18        /* of a request: the header, 64 KiB in pages, the status */
#define LONG_PIECES 256         /* requests with more pieces than that, at once */

struct worker;
struct queue;

/* What the worker tells Python. Field order and width are `EVENT` in ring/worker.py. */
enum worker_event_kind {
    EVENT_REQUEST = 1,     /* id, type, flags, offset, nbytes: Python decides and finishes it */
    EVENT_DONE = 2,        /* id: operation, result */
    EVENT_CONTROL = 3,     /* the control fd was signalled */
    EVENT_DRAINED = 4,     /* id: queue, result: base */
    EVENT_BROKEN = 5,      /* id: queue */
    EVENT_SYNC_FAILED = 6, /* id: slot, result: -errno */
    EVENT_IDLE = 7,        /* paused, and nothing is in flight; or the last awaited request has ended */
    EVENT_QUIET = 8,       /* id: queue, disabled, and nothing of it is in flight */
    EVENT_ROOM = 9,        /* an operation is free again, of which Python was refused one */
};

struct worker_event {
    uint32_t kind;
    int32_t result;
    uint64_t id;
    uint32_t type;
    uint32_t flags;
    uint64_t offset;
    uint64_t nbytes;
};
_Static_assert(sizeof(struct worker_event) == 40, "EVENT in ring/worker.py");

/* Read by other threads, too. What takes how long, as of worker->now, a clock that is read a few times a round. */
struct queue_statistics {
    uint64_t requests;        /* that were answered */
    struct histogram wait;    /* from a kick until the first chain behind it is taken */
    struct histogram service; /* from there until it is answered */
};

struct worker_statistics {
    struct histogram data;     /* transfers of guest data */
    struct histogram metadata; /* other transfers, and zeroing */
    struct histogram sync;     /* from joining the line until it is served */
    struct queue_statistics queues[WORKER_QUEUES];
};

/* Somebody in a line: a request, or an operation of Python's if request is NULL. */
struct waiter {
    struct waiter *next;
    struct request *request;
    uint64_t since; /* when it joined; of an operation that transfers, when it began */
    uint32_t operation;
};

struct line {
    struct waiter *first;
    struct waiter **last;
};

enum request_state { REQUEST_FREE = 0, REQUEST_BUSY, REQUEST_IN_PYTHON };

/* One chain in flight; its slot is its head. The device sets what Python sees
 * (type, flags, offset, nbytes) and `data`, the pieces that carry nbytes. */
struct request {
    struct waiter waiter;
    struct line followers; /* for the device: whom the end of this one serves, too */
    struct queue *queue;
    struct iovec *pieces; /* readable, then writable; inline_pieces or one of the worker's long arrays */
    struct iovec *data;
    uint8_t *status; /* where the status byte goes */
    uint64_t readable_nbytes;
    uint64_t writable_nbytes;
    uint64_t begun_at;
    uint64_t offset;
    uint64_t nbytes;
    uint32_t readable_count;
    uint32_t writable_count;
    uint32_t type;
    uint32_t flags;
    uint32_t generation; /* tells a slice of an earlier request in this slot */
    uint32_t parts;      /* transfers under way */
    int32_t error;       /* the first that failed */
    uint16_t head;
    uint8_t state;
    uint8_t synced; /* for the device: it waited in a sync already */
    uint8_t traced;  /* its end is recorded, too */
    uint8_t awaited; /* somebody waits for its end */
    uint8_t then;    /* for the device: what is left to do when its parts have ended */
    uint16_t flight; /* for the device: the first of its flights; 0: none */
    struct iovec inline_pieces[INLINE_PIECES];
};

/* What a device does with requests. */
struct device {
    /* A chain was popped: begin serving it. */
    void (*begin)(struct device *device, struct worker *worker, struct request *request);
    /* Its transfers, its sync or Python came to an end. result: 0, -errno, or
     * the status > 0 that Python gave. */
    void (*end)(struct device *device, struct worker *worker, struct request *request, int result);
};

struct queue {
    struct virtqueue ring;
    struct virtqueue_layout layout;
    struct request *requests; /* [size] */
    uint64_t kicked_at; /* and nothing was taken since; 0: not so */
    uint32_t in_flight;
    uint32_t operations;    /* of them, */
    uint32_t long_requests; /* requests with long pieces, */
    uint64_t busy_nbytes;   /* and bytes of all */
    uint32_t kick_generation;
    int kick_fd;
    int call_fd;
    int err_fd;
    uint16_t index;
    bool started;
    bool absent; /* the memory table does not hold the ring, for now */
    bool enabled;
    bool quiet_owed; /* EVENT_QUIET is to come */
    bool has_kick; /* a kick was set, be it "none" */
    bool draining;
    bool active; /* in worker->active: looked at in each round */
    bool dirty;  /* in worker->dirty: the driver was not asked yet whether it wants a call for what it was shown */
    bool armed;  /* the driver was asked to kick */
    bool broken; /* and Python was told */
    bool logs;   /* what is written to its device area is logged, */
    uint64_t log_address; /* as if the area lay at this guest address */
};

/* A mapping of a file, and which of its pages were seen in the page cache (window.h). */
struct window {
    const uint8_t *bytes; /* NULL: none, or never if it was refused */
    uint64_t nbytes;
    uint64_t *seen; /* a bit a page */
    uint64_t waits; /* of this thread for pages, so far */
    uint64_t resumes; /* before this time nothing is noted */
    uint32_t losses;
    uint32_t doubt; /* so many pages of a stretch say nothing of the others: answers of the kernel were no */
    bool refused;
};

/* A mapping of a file, to store single words (word.h). */
struct words {
    uint8_t *bytes; /* NULL: none */
    uint64_t nbytes;
    uint64_t length; /* of them, those that the file has, at least */
    uint32_t losses; /* stores to it that went nowhere */
    bool refused;    /* no other mapping is asked for */
};

struct file {
    int fd;
    int direct_fd;         /* -1: none */
    struct pace pace;
    struct pace sync_pace;
    uint32_t memory_align; /* what O_DIRECT wants, powers of two */
    uint32_t offset_align;
    bool syncs;   /* false: a sync succeeds at once */
    enum storage storage;
    uint32_t occupying;     /* operations in the kernel that a thread is, or may be, occupied with */
    uint32_t first_waiting; /* list through operation.next of those whose turn comes when others end; */
    uint32_t last_waiting;  /* WORKER_OPERATIONS ends it */
    bool syncing; /* an fdatasync is in flight, for `served` */
    bool joined;  /* somebody waits for pages that nobody has sent to the disk */
    uint64_t dirty;         /* bytes in the page cache that no fdatasync was started for, at most */
    uint64_t syncing_dirty; /* and that the one in flight is for */
    uint64_t trace_id; /* of that fdatasync */
    uint64_t sync_began;
    uint32_t quick_syncs;   /* the last so many */
    uint32_t interruptions; /* of syncs, the last so many */
    struct words words;
    struct window window;
    int error;    /* of a failed fdatasync, for good */
    struct line waiting;
    struct line served;
};

enum transfer_flag {
    TRANSFER_READ = 0,
    TRANSFER_WRITE = 1,
    TRANSFER_DATA = 2,
    TRANSFER_DESPITE = 4, /* of one piece: also after a sync of the file has failed */
};

#define PIECE_HOST UINT64_MAX        /* piece.start is an address of this process */
#define PIECE_ZEROS (UINT64_MAX - 1) /* nbytes of zeros, to be written */

/* Where bytes come from or go to: a part of a request's data, or ours. */
struct piece {
    uint64_t source; /* a request's id, PIECE_HOST, PIECE_ZEROS */
    uint64_t start;
    uint64_t nbytes;
};

/* A whole stretch of a file, of which a part of a request's data replaces what is elsewhere. */
struct request_copy {
    uint32_t slot;
    uint32_t old_slot; /* EXTENT_NO_SLOT: what is elsewhere are zeros */
    uint64_t host_offset;
    uint64_t old_offset;
    uint64_t nbytes; /* of the stretch */
    uint64_t ahead;  /* of them, before the request's */
    const struct extent_cipher *cipher; /* of the stretch, of what is elsewhere; NULL: the bytes are as they are */
    const struct extent_cipher *old_cipher;
};

enum verb { VERB_FREE = 0, VERB_WAIT, VERB_READ, VERB_WRITE, VERB_PUNCH, VERB_ZERO_RANGE };

struct operation {
    struct waiter waiter;
    struct request *request;    /* of a device; NULL: Python's */
    const struct piece *pieces; /* &piece, or an array that Python keeps */
    struct piece piece;
    uint32_t piece_count;
    uint32_t slot;
    uint64_t host_offset;
    uint64_t nbytes;
    uint64_t progress;
    uint64_t trace_id; /* of what is in the kernel now */
    uint8_t verb;
    uint8_t epoch;
    const struct extent_cipher *cipher; /* of a device's transfer; NULL: the bytes are as they are */
    bool data;   /* may go through direct_fd */
    bool stores; /* may be a store, if it is a word */
    bool direct; /* went through it */
    bool despite; /* carried out though a sync of the file has failed */
    bool has_turn; /* it has waited for that, see turn.c */
    bool occupies; /* counts in file.occupying */
    uint8_t refusals; /* in a row: the kernel said "not now" */
    uint32_t next;
    uint32_t bounce_nbytes;
    uint8_t *bounce; /* NULL: none; what O_DIRECT writes in place of pieces that do not suit it, or what is copied */
    const struct request_copy *copy; /* NULL: none; else the request's part of it is `piece` */
};

/* Two epochs: a grace closes one and waits until nothing begun in it is left. */
struct grace {
    uint32_t in_flight[2];
    uint8_t epoch; /* of what begins now */
    bool running;  /* waiting for the other one, for `served` */
    struct line waiting;
    struct line served;
};

struct worker {
    struct uring uring;
    struct device *device;
    uint64_t round; /* grows each time worker_run returns to Python */
    struct worker_counters *counters;
    struct poll poll;
    struct worker_statistics statistics;
    uint64_t now; /* ns, not long ago */
    struct trace *trace; /* NULL: nobody wants one */
    struct guest_memory memory;
    struct dirty_log log;
    uint8_t *inflight; /* the in-flight region, NULL: none */
    uint32_t inflight_queues;
    uint64_t inflight_nbytes;
    int control_fd;
    int thread_id;
    uint32_t losses; /* of shared memory, that broke a queue already */
    uint32_t losses_judged; /* and those that are known to be of guest memory, or not: */
    bool memory_has_lost;   /* a page of the table's regions is gone */
    bool at_peer; /* in a system call on an fd that the front-end has, too; other threads look at it */
    bool paused;
    bool idle_owed; /* EVENT_IDLE is to come */
    uint32_t awaited; /* requests; the last of them brings EVENT_IDLE, too */
    bool progress;  /* something happened in this round */
    bool control_unarmed; /* nothing polls control_fd: there was no entry */
    bool control_told; /* an EVENT_CONTROL is not delivered yet */
    uint32_t requests_in_flight;
    uint64_t busy_nbytes;     /* of the requests in flight and of those that ended in this round */
    uint64_t returned_nbytes; /* of the latter alone */
    uint32_t generation; /* of the request begun last */
    uint16_t lone_queue; /* which it came from, */
    uint32_t lone_count; /* and so many before it */
    uint32_t submitted; /* operations and syncs in the kernel */
    bool goes_aside;    /* the last long read did */
    uint32_t at_once;   /* writes that Python may still do on this thread before it lets C go on */

    uint32_t event_count;
    uint32_t delivered; /* of them, seen by Python */
    struct worker_event *events;

    uint32_t file_count;
    uint32_t free_operation; /* list through operation.next; WORKER_OPERATIONS ends it */
    uint32_t free_operations;
    uint32_t python_operations;
    bool refused_python; /* EVENT_ROOM is to come */
    uint32_t far_occupying; /* of all far files */
    uint32_t waiting_files; /* with operations that wait for their turn */
    uint64_t bounce_nbytes; /* of all operations */
    uint32_t idle_bounces;
    uint8_t *bounces[IDLE_BOUNCES]; /* the idle ones */
    uint32_t stalled; /* list of operations that the kernel would not take yet */
    struct grace grace;

    uint32_t active_count;
    uint32_t first_active;
    uint32_t dirty_count;
    uint32_t free_long;
    struct queue *active[WORKER_QUEUES];
    struct queue *dirty[WORKER_QUEUES];
    struct iovec *long_free[LONG_PIECES];
    struct iovec *long_pieces; /* [LONG_PIECES][CHAIN_PIECES_MAX] */
    struct file files[WORKER_FILES];
    struct queue queues[WORKER_QUEUES];
    struct operation operations[WORKER_OPERATIONS];
    struct chain chain; /* the one being popped */
    uint8_t old[PACE_NBYTES]; /* what a copy in progress keeps */
};

/* ---- for Python; queues are numbered 0 .. WORKER_QUEUES - 1, results are >= 0 or -errno ---- */

/* On the thread that is to run it. control_fd and counters are borrowed. NULL and *error = errno if the kernel refuses
 * the io_uring, or the threads that stand in for it. */
struct worker *worker_create(struct device *device, int control_fd, struct worker_counters *counters, int use_threads,
                             int *error);

/* Waits for what the kernel still does on our memory, closes every fd it was
 * given to own. From then on every request is stale and no slot is known; the
 * memory stays for those who still hold the pointer, until worker_free. */
void worker_close(struct worker *worker);
void worker_free(struct worker *worker);

/* From any thread, also for NULL: if the worker sleeps on an fd of the front-end's, wake it; it goes on as if the fd were broken.
 * Whoever waits for the worker does so again and again: it may be about to sleep, or about to sleep on the next one. */
void worker_nudge(struct worker *worker);

/* Serve until there is an event. -> the number of events in worker_events, good until the next call. */
int worker_run(struct worker *worker);
struct worker_event *worker_events(struct worker *worker);
/* Python has seen the events of the last run: their operations may be used again. The next run does it, too. */
void worker_forget_delivered(struct worker *worker);

/* Let the requests in flight that use the region, with their buffers or the ring they go back to, be awaited. */
void worker_await_region(struct worker *worker, const struct guest_region *region);
uint32_t worker_awaited(struct worker *worker);
/* Replace the table. Nothing in flight uses a region that is gone: pause first.
 * A ring that is gone is left alone until a later table holds it again. */
void worker_set_memory(struct worker *worker, const struct guest_memory *memory);
/* Look at the rings for so long, at most, before sleeping; 0 at first. */
void worker_set_poll(struct worker *worker, uint32_t microseconds);
void worker_pause(struct worker *worker, int paused);
uint32_t worker_requests_in_flight(struct worker *worker);
const struct worker_statistics *worker_statistics(struct worker *worker); /* good until worker_free */

/* Track what is in flight in this memory, or, NULL, no more. It is borrowed for as
 * long as a queue is started. -EBUSY: one is; -EINVAL: it has no queues, or is misaligned. */
int worker_set_inflight(struct worker *worker, void *region, uint64_t nbytes, uint32_t num_queues);

enum ring_flag { RING_EVENT_IDX = 1, RING_PACKED = 2 };

/* -> 1: it is not tracked, the in-flight region has no room for it; else 0. A ring that is none (-EINVAL, -EFAULT) is
 * told of through the err fd, too. */
int worker_start_queue(struct worker *worker, uint32_t index, uint32_t size, uint64_t descriptor_address,
                       uint64_t driver_address, uint64_t device_address, uint32_t base, uint32_t ring_flags);
int worker_set_kick(struct worker *worker, uint32_t index, int fd);
int worker_set_call(struct worker *worker, uint32_t index, int fd);
int worker_set_err(struct worker *worker, uint32_t index, int fd);
/* Disabled, it is fetched from no more, and EVENT_QUIET follows; it does not outlast being enabled again. */
int worker_set_enabled(struct worker *worker, uint32_t index, int enabled);
int worker_drain_queue(struct worker *worker, uint32_t index);
const char *worker_queue_fault(struct worker *worker, uint32_t index);

/* The dirty log. `log` is borrowed until the next call, which ends all writes to it; NULL: none. */
void worker_set_log(struct worker *worker, const struct guest_region *log);
int worker_set_log_call(struct worker *worker, int fd);
void worker_log_buffers(struct worker *worker, int enabled);
/* Also for a queue that is not started yet; it stays so until the next call. */
int worker_log_queue(struct worker *worker, uint32_t index, int enabled, uint64_t guest_address);

/* What has to be known of a file; finding out may hang, so it is for another thread than the worker's. */
struct file_traits {
    enum storage storage;
    struct host_alignment alignment; /* of O_DIRECT */
};
void worker_look_at(int fd, int direct_fd, struct file_traits *traits);
int worker_add_file(struct worker *worker, int fd, int direct_fd, int sync, const struct file_traits *traits);
/* Whether a call on the file may be made on the worker's thread. */
int worker_is_near(struct worker *worker, uint32_t slot);
/* The file is about to be no longer than that. */
void worker_cut_file(struct worker *worker, uint32_t slot, uint64_t nbytes);
/* Nothing is under way on it; its number may be given to another file. */
void worker_remove_file(struct worker *worker, uint32_t slot);

/* Record from now on what changes a file, what is synced, and the requests for it; NULL ends that. Borrowed. */
void worker_set_trace(struct worker *worker, struct trace *trace);

/* -> the operation's number, EVENT_DONE follows with its result; -EBUSY: none is free, later. */
int worker_transfer(struct worker *worker, uint32_t flags, uint32_t slot, uint64_t host_offset, uint64_t source,
                    uint64_t start, uint64_t nbytes);
int worker_transfer_pieces(struct worker *worker, uint32_t flags, uint32_t slot, uint64_t host_offset,
                           const struct piece *pieces, uint32_t count);
/* Write on this thread. -> 0: it is complete; -EAGAIN: not now, begin a transfer; or how it failed. */
int worker_write_at_once(struct worker *worker, uint32_t flags, uint32_t slot, uint64_t host_offset,
                         const struct piece *pieces, uint32_t count);
/* The same for parts, whose bytes follow each other; so many are *done, and the next one ended so. */
int worker_write_some(struct worker *worker, uint32_t slot, uint32_t count, const uint64_t *host_offsets,
                      const uint32_t *nbytes, const uint8_t *bytes, uint32_t *done);
int worker_zero(struct worker *worker, uint32_t slot, uint64_t host_offset, uint64_t nbytes);
int worker_sync(struct worker *worker, uint32_t slot);
int worker_grace(struct worker *worker);

/* On requests that are in Python. -ESTALE: this one is not, any more. */
int worker_finish(struct worker *worker, uint64_t id, uint32_t status);
int worker_load(struct worker *worker, uint64_t id, uint64_t start, void *to, uint64_t nbytes);
int worker_store(struct worker *worker, uint64_t id, uint64_t start, const void *from, uint64_t nbytes);
int worker_clear(struct worker *worker, uint64_t id, uint64_t start, uint64_t nbytes);
