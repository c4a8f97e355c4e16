"""One thread that serves a device's queues: batches in, batches out.

The worker thread owns the rings, the io_uring and everything that `Request`s and operations touch. It lives in
`worker_run`, without the GIL, until C has something for Python; then one batch of events is dispatched here, then
the functions that other threads posted are run, then it goes back. "Worker thread" in a docstring means: only from
`on_request`, from a `done`, or from a function given to `call`.
"""

import errno
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from concurrent.futures import wait as wait_for_any
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Protocol, TypeVar

from ring.aio import PLAIN, Aio, WorkerOptions
from ring.counter import Counters
from ring.host import HOST, Host
from ring.inflight import InflightRegion
from ring.memory import Mapping, MemoryRegion, map_regions, native_table
from ring.native import NULL, Pointer, check, ffi, lib
from ring.operations import DATA, READ, WRITE, Done, Operations, Piece
from ring.request import Request
from ring.statistics import Statistics
from ring.statistics import snapshot as statistics_snapshot
from ring.thread import new_future, start_deaf
from ring.trace import Trace
from ring.virtqueue import QueueLayout

T = TypeVar("T")

NUDGE_SECONDS = 0.1  # between the nudges of one who waits for the worker thread
POOL_THREADS = 2
QUIET_TURNS = 256  # of the loop, until requests are held up though work that they do not wait for is under way

EVENT = struct.Struct("=IiQIIQQ")  # struct worker_event: kind, result, id, type, flags, offset, nbytes
REQUEST, DONE, CONTROL, DRAINED, BROKEN, SYNC_FAILED, IDLE, QUIET = 1, 2, 3, 4, 5, 6, 7, 8  # enum worker_event_kind


class NativeDevice(Protocol):
    """A device's half in C: parses each popped chain, serves it or punts (`virtio.native.NativeBlock`)."""

    @property
    def native(self) -> Pointer:
        """Its `struct device`, valid as long as this object."""


class Worker:
    """A context manager: entering starts the thread, leaving stops and joins it."""

    def __init__(
        self,
        device: NativeDevice,
        on_request: Callable[[Request], None],
        options: WorkerOptions = PLAIN,
        *,
        on_queue_broken: Callable[[int, str], None] | None = None,
        on_death: Callable[[BaseException], None] | None = None,
        host: Host = HOST,
    ) -> None:
        """Nothing starts yet.

        *on_request(request)* begins a request, on the worker thread. *on_queue_broken(index, fault)* tells, on the
        worker thread, of a queue that was stopped because its ring is nonsense; its err fd has been signalled.
        *on_death(error)* is called on the dying worker thread if anything raised there: a bug of ours, and the
        process cannot go on serving. `stop` raises that error too. Once started, `aio` says what is used and
        `io_uring_refusal` why it is threads if the *options* left that open.
        """
        self.aio = options.aio
        self._options = options
        self.io_uring_refusal: OSError | None = None
        self._device = device
        self._on_request = on_request
        self._on_queue_broken = on_queue_broken
        self._on_death = on_death
        self._host = host
        self._pool = host.pool(POOL_THREADS, "compute")
        self._host_pool = host.pool(POOL_THREADS, "host")
        self._thread = threading.Thread(target=self._main, name="worker", daemon=True)
        self._started: Future[None] = new_future()
        self._lock = threading.Lock()  # guards _open, and the control fd while it is written
        self._open = False
        self._calls: deque[tuple[Callable[[], Any], Future[Any] | None]] = deque()
        self._computed: deque[Callable[[], None]] = deque()
        self._computing = 0
        self._stopping = False
        self._death: BaseException | None = None
        self._control = -1
        self._native: Pointer = NULL
        self._counters: Pointer = ffi.new("struct worker_counters *")
        self._mappings: dict[MemoryRegion, Mapping] = {}
        self._log: Mapping | None = None
        self._inflight: Mapping | None = None
        self._draining: dict[int, Callable[[int], None]] = {}
        self._disabling: dict[int, list[Callable[[], None]]] = {}
        self._queues: set[int] = set()
        self._trace: Trace | None = None  # C writes to it
        self._on_sync_failed: dict[int, Callable[[int], None]] = {}

    def __enter__(self) -> "Worker":
        """Start the thread. Raises: OSError if the kernel refuses what `aio` asks for."""
        self._control = self._host.eventfd()
        self._open = True
        try:
            start_deaf(self._thread)
        except OSError:
            self._close()
            raise
        try:
            self._started.result()
        except BaseException:
            self._thread.join()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    # from any thread

    def call(self, function: Callable[[], T]) -> T:
        """Run *function* on the worker thread between two batches and wait for it; raises what it raises.

        Raises: RuntimeError on the worker thread itself, or if that thread has ended.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError("call() waits for the worker thread and cannot be used on it")
        future: Future[T] = new_future()
        self._post(function, future)
        return self.wait(future)

    def call_patiently(self, function: Callable[[Callable[[], bool]], T], seconds: float) -> T:
        """As `call`, for a function that is given *is_late*, which says after *seconds* that it had better give up."""
        late = threading.Event()
        end = time.monotonic() + seconds
        future: Future[T] = new_future()
        self._post(lambda: function(late.is_set), future)
        while time.monotonic() < end and wait_for_any([future], NUDGE_SECONDS).not_done:
            lib.worker_nudge(self._native)
        late.set()
        with self._lock:
            if self._open:
                self._host.signal(self._control)
        return self.wait(future)

    def wait(self, future: "Future[T]") -> T:
        """The result of *future*, which is set on the worker thread; raises what it holds.

        A front-end can make that thread sleep on a kick or call fd that the two of them share. It is called away from
        there as long as somebody waits for it, so that nobody else suffers.
        """
        while wait_for_any([future], NUDGE_SECONDS).not_done:
            lib.worker_nudge(self._native)
        return future.result()

    def post(self, function: Callable[[], None]) -> None:
        """Run *function* on the worker thread between two batches; do not wait.

        Raises: RuntimeError if that thread has ended.
        """
        self._post(function, None)

    def stop(self) -> None:
        """Drain every queue and operation, end the thread and join it; twice is fine.

        Raises: whatever killed the worker thread, if something did.
        """
        with self._lock:
            if self._open:
                self._calls.append((self._drain, None))
                self._host.signal(self._control)
        while self._thread.is_alive():
            self._thread.join(NUDGE_SECONDS)
            lib.worker_nudge(self._native)
        death, self._death = self._death, None
        if death is not None:
            raise death

    @property
    def counters(self) -> Counters:
        """What was counted so far; also after `stop`."""
        return Counters(self._counters)

    @property
    def statistics(self) -> Statistics:
        """How long things took so far; also after `stop`."""
        native: Any = lib.worker_statistics(self._native)
        return statistics_snapshot(native)

    # worker thread: memory and queues

    def set_memory(self, regions: Sequence[MemoryRegion]) -> None:
        """Replace the memory table; returns when nothing in flight uses a region that is not in it any more.

        However long that takes: a disk may still write there. What uses other regions is not waited for. Regions that
        were in the table before (the same objects) keep their mapping. It goes on serving what is in flight while it
        waits, so it is for functions given to `call` only. A started queue whose ring is not inside the table is left
        alone until it is again: QEMU moves a region by removing it first.
        Raises: OSError if a region cannot be mapped or overlaps another; the table is then as it was.
        """
        added = map_regions([region for region in regions if region not in self._mappings])
        mappings = {region: self._mappings.get(region) or added[region] for region in regions}
        try:
            table = native_table(mappings)
        except OSError:
            for mapping in added.values():
                mapping.close()
            raise
        removed = [mapping for region, mapping in self._mappings.items() if region not in mappings]
        self._await_ends(removed)
        lib.worker_set_memory(self._native, table)
        self._mappings = mappings
        for mapping in removed:
            mapping.close()

    def set_inflight(self, region: InflightRegion | None) -> None:
        """Track what queues that start from now on have in flight in *region*, or not at all.

        What a region says was left in flight is served first. One that contradicts itself breaks its queue; a queue
        for which it has no room is served without.
        Raises: OSError if it cannot be mapped or has no queues, EBUSY while a queue is started.
        """
        mapping = None if region is None else Mapping(region.memory())
        try:
            address: Any = NULL if mapping is None else mapping.address
            nbytes, num_queues = (0, 0) if region is None else (region.nbytes, region.num_queues)
            check(lib.worker_set_inflight(self._native, address, nbytes, num_queues), "in-flight region")
        except OSError:
            if mapping is not None:
                mapping.close()
            raise
        if self._inflight is not None:
            self._inflight.close()
        self._inflight = mapping

    def start_queue(self, index: int, layout: QueueLayout) -> bool:
        """Give a stopped queue its ring. It is served once it is also enabled and its kick is set.

        It is then looked at once, kicked or not. False: the in-flight region has no room for it; it is served without.
        Raises: OSError EINVAL for a size, an alignment or a base, EFAULT for an address outside guest memory, both
        after its err fd was signalled; EBUSY if it is started.
        """
        untracked = check(
            lib.worker_start_queue(
                self._native,
                index,
                layout.size,
                layout.descriptor_address,
                layout.driver_address,
                layout.device_address,
                layout.base,
                lib.RING_EVENT_IDX * layout.event_idx | lib.RING_PACKED * layout.packed,
            ),
            f"queue {index}: {layout}",
        )
        self._queues.add(index)
        return not untracked

    def set_kick(self, index: int, fd: int | None) -> None:
        """Take over *fd* as the queue's kick; None means the driver does not kick and the ring is polled.

        Raises: OSError EINVAL if *fd*, closed then, is a file or disk, which never makes anybody wait.
        """
        check(lib.worker_set_kick(self._native, index, -1 if fd is None else fd), f"kick of queue {index}")

    def set_call(self, index: int, fd: int | None) -> None:
        """Take over *fd* as the queue's call.

        Signalled once, now or when the queue starts: a completion may have raced with the change, or with the death of
        an earlier daemon. Not while the queue is stopped: a driver may not be there.
        """
        check(lib.worker_set_call(self._native, index, -1 if fd is None else fd), f"call of queue {index}")

    def set_err(self, index: int, fd: int | None) -> None:
        """Take over *fd*, signalled if the queue breaks."""
        check(lib.worker_set_err(self._native, index, -1 if fd is None else fd), f"err of queue {index}")

    def enable_queue(self, index: int) -> None:
        """Let the queue be served."""
        check(lib.worker_set_enabled(self._native, index, True), f"queue {index}")

    def disable_queue(self, index: int, done: Callable[[], None]) -> None:
        """Fetch nothing more; *done()* once nothing of the queue is in flight, or it is enabled again.

        From then on its ring is left untouched until it is enabled. *done* always comes later, never from within this
        call; other queues are served meanwhile.
        """
        check(lib.worker_set_enabled(self._native, index, False), f"queue {index}")
        self._disabling.setdefault(index, []).append(done)

    def set_log(self, log: MemoryRegion | None) -> None:
        """Set bits in *log*, one for 4096 bytes of guest memory, from now on; no more in the log before it.

        Raises: OSError if it cannot be mapped or its file is too short; the log before it then stays.
        """
        mapping = None if log is None else Mapping(log)
        lib.worker_set_log(self._native, NULL if mapping is None else mapping.native)
        if self._log is not None:
            self._log.close()
        self._log = mapping

    def set_log_call(self, fd: int | None) -> None:
        """Take over *fd*, signalled after bits were set in the log."""
        lib.worker_set_log_call(self._native, -1 if fd is None else fd)

    def log_buffers(self, enabled: bool) -> None:
        """Whether what requests write to their buffers is logged, those in flight included."""
        lib.worker_log_buffers(self._native, enabled)

    def log_queue(self, index: int, guest_address: int | None) -> None:
        """Whether what is written to the queue's device area is logged, and as what; running or not."""
        enabled = guest_address is not None
        check(lib.worker_log_queue(self._native, index, enabled, guest_address or 0), f"log of queue {index}")

    def drain_queue(self, index: int, done: Callable[[int], None]) -> None:
        """Stop fetching, finish what is in flight, drop kick and call, then *done(base)*: the next available index.

        From then on the ring is not touched and nobody is signalled. *done* always comes later, never from within
        this call. A queue that was never started answers base 0.
        """
        check(lib.worker_drain_queue(self._native, index), f"queue {index}")
        self._draining[index] = done

    def quiesce(self) -> None:
        """Return once no request and no operation is under way. For functions given to `call` only."""
        with self._quiesced():
            pass

    def run_alone(self, begin: Callable[[Callable[[T], None]], None], is_late: Callable[[], bool]) -> T:
        """Call *begin(done)* once no request and no operation is under way -> what *done* is given, whenever it is.

        Requests wait meanwhile, those of all queues, and until what was begun beside has ended. For functions given to
        `call` and `call_patiently` only.
        Raises: TimeoutError if *is_late()* before it has begun.
        """
        results: list[T] = []
        self._await_quiet(is_late)
        with self._quiesced(is_late):
            begin(results.append)
            while not results:
                self._turn()
            self._finish_all()
        return results[0]

    # worker thread: files and the engine's operations

    def add_file(
        self,
        fd: int,
        *,
        direct_fd: int = -1,
        sync: bool = True,
        on_sync_failed: Callable[[int], None] | None = None,
        traits: Pointer | None = None,
    ) -> int:
        """Register a file and return its slot; the fds stay the caller's and must outlive the worker.

        *direct_fd* (O_DIRECT) serves `data` transfers and the extent map's where everything is aligned. With
        ``sync=False`` syncs succeed at once. *on_sync_failed(errno)* is told once, on the worker thread, if an
        fdatasync failed; from then on every write, zero and sync of the slot fails with EIO. *traits* are what
        `look_at` has found; without them this thread looks.
        """
        traits = look_at(fd, direct_fd) if traits is None else traits
        slot = check(lib.worker_add_file(self._native, fd, direct_fd, sync, traits), "file of the worker")
        if on_sync_failed is not None:
            self._on_sync_failed[slot] = on_sync_failed
        return slot

    def remove_file(self, slot: int) -> None:
        """Forget the file in *slot*, on which nothing is under way; its fds may be closed, the number used again."""
        lib.worker_remove_file(self._native, slot)
        self._on_sync_failed.pop(slot, None)

    def set_trace(self, trace: Trace) -> None:
        """Record from now on what changes the files, what is synced and the requests for it; it outlives the worker."""
        self._trace = trace
        lib.worker_set_trace(self._native, trace.native)

    def read(self, slot: int, host_offset: int, pieces: Sequence[Piece], done: Done, *, data: bool = False) -> None:
        """Fill *pieces* one after the other, with zeros past the end of the file."""
        self._operations.transfer(READ | DATA * data, slot, host_offset, pieces, done)

    def write(self, slot: int, host_offset: int, pieces: Sequence[Piece], done: Done, *, data: bool = False) -> None:
        """Write *pieces* one after the other; their bytes must not change until *done*."""
        self._operations.transfer(WRITE | DATA * data, slot, host_offset, pieces, done)

    def write_at_once(self, slot: int, host_offset: int, pieces: Sequence[Piece], *, data: bool = False) -> bool:
        """Write *pieces* before this returns, if they are few bytes and the host does not make writers wait lately.

        False: use `write`, for all of it. Raises: OSError, how the write failed.
        """
        return self._operations.write_at_once(WRITE | DATA * data, slot, host_offset, pieces)

    def write_some(self, slot: int, parts: Sequence[tuple[int, bytes]]) -> int:
        """Write the first of *parts*, host offset and bytes, before this returns -> how many; `write` the next."""
        return self._operations.write_some(slot, parts)

    def write_now(self, slot: int, host_offset: int, data: bytes) -> None:
        """Write *data*, a few bytes, before this returns, whatever the host does to writers. Raises: OSError."""
        self._operations.write_now(slot, host_offset, data)

    def zero(self, slot: int, host_offset: int, nbytes: int, done: Done) -> None:
        """Make the range read as zeros without changing the file's length; give its space back where possible."""
        self._operations.zero(slot, host_offset, nbytes, done)

    def sync(self, slot: int, done: Done) -> None:
        """Join the group commit: *done* after an fdatasync that started after now."""
        self._operations.sync(slot, done)

    def grace(self, done: Done) -> None:
        """*done* after everything in flight now is done: C's transfers and Python's reads, writes and zeros."""
        self._operations.grace(done)

    def is_near(self, slot: int) -> bool:
        """Whether the file in *slot* may be called on this thread: no network, no other process is in between."""
        return bool(lib.worker_is_near(self._native, slot))

    def compute(self, function: Callable[[], T], done: Callable[[T | None, BaseException | None], None]) -> None:
        """Run *function* on a pool thread, or here without one, then *done(result, error)* on the worker thread."""
        self._run_in(self._pool, function, done, _computed)

    def call_host(self, function: Callable[[], T], done: Callable[[T | None, BaseException | None], None]) -> None:
        """The same for one that may hang, and holds up no computation; without a thread it fails with EAGAIN."""
        self._run_in(self._host_pool, function, done, _refused)

    def _run_in(
        self,
        pool: Executor,
        function: Callable[[], T],
        done: Callable[[T | None, BaseException | None], None],
        without_thread: "Callable[[Callable[[], T]], Future[T]]",
    ) -> None:
        future: Future[T] = new_future()
        try:
            pool.submit(partial(_run, future, function))
        except (RuntimeError, MemoryError):  # no thread to be had, but it is queued for one that comes later
            if future.cancel():
                future = without_thread(function)
        self._computing += 1
        future.add_done_callback(lambda future: self._deliver(future, done))

    # the thread

    def _main(self) -> None:
        try:
            self._open_native()
        except BaseException as error:  # raised where the thread was started
            self._close()
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        try:
            while not self._stopping:
                self._turn()
                self._run_calls()
        except BaseException as death:
            self._death = death
            if self._on_death is not None:
                self._on_death(death)
        finally:
            self._close()

    def _open_native(self) -> None:
        self._native = ffi.gc(self._create(), lib.worker_free)  # requests may outlive the thread
        lib.worker_set_poll(self._native, self._options.poll_us)
        self._operations = Operations(self._native)
        events: Any = lib.worker_events(self._native)
        self._events = memoryview(ffi.buffer(events, lib.WORKER_EVENTS * EVENT.size))

    def _create(self) -> Pointer:
        if self.aio is Aio.AUTO:
            try:
                return self._create_with(Aio.IO_URING)
            except OSError as refusal:
                self.io_uring_refusal = refusal
                return self._create_with(Aio.THREADS)
        return self._create_with(self.aio)

    def _create_with(self, aio: Aio) -> Pointer:
        error = ffi.new("int *")
        use_threads = aio is Aio.THREADS
        native = lib.worker_create(self._device.native, self._control, self._counters, use_threads, error)
        if not native:
            raise OSError(error[0], os.strerror(error[0]), aio.value)
        self.aio = aio
        return native

    def _turn(self) -> None:
        """Serve in C until there is something for Python, and dispatch it."""
        count = check(lib.worker_run(self._native), self.aio.value)
        for kind, result, number, type_, flags, offset, nbytes in EVENT.iter_unpack(self._events[: count * EVENT.size]):
            if kind == REQUEST:
                self._on_request(Request(self._native, number, type_, flags, offset, nbytes))
            elif kind == DONE:
                self._operations.finish(number, result)
            elif kind == CONTROL:
                self._run_computed()
            elif kind == DRAINED:
                self._queues.discard(number)
                self._draining.pop(number)(result & 0xFFFFFFFF)
            elif kind == QUIET:
                for done in self._disabling.pop(number, ()):
                    done()
            elif kind == BROKEN:
                self._report_fault(number)
            elif kind == SYNC_FAILED:
                self._report_failed_sync(number, -result)
        self._operations.begin_waiting()

    def _report_fault(self, index: int) -> None:
        fault: Any = lib.worker_queue_fault(self._native, index)
        if self._on_queue_broken is not None:
            self._on_queue_broken(index, ffi.string(fault).decode())

    def _report_failed_sync(self, slot: int, errno: int) -> None:
        tell = self._on_sync_failed.get(slot)
        if tell is not None:
            tell(errno)

    def _post(self, function: Callable[[], Any], future: "Future[Any] | None") -> None:
        with self._lock:
            if not self._open:
                raise RuntimeError("the worker has ended")
            self._calls.append((function, future))
            self._host.signal(self._control)

    def _run_calls(self) -> None:
        while self._calls:
            function, future = self._calls.popleft()
            if future is None:
                function()
                continue
            try:
                future.set_result(function())
            except Exception as error:  # the caller's to handle
                future.set_exception(error)

    def _deliver(self, future: Future[T], done: Callable[[T | None, BaseException | None], None]) -> None:
        error = future.exception()
        result = future.result() if error is None else None
        self._computed.append(lambda: done(result, error))
        self._host.signal(self._control)  # open: `_drain` waits for what is being computed

    def _run_computed(self) -> None:
        while self._computed:
            self._computed.popleft()()
            self._computing -= 1

    def _await_ends(self, mappings: Sequence[Mapping]) -> None:
        """Serve what is in flight without fetching anything new, until none of it uses one of *mappings*."""
        lib.worker_pause(self._native, 1)
        for mapping in mappings:
            lib.worker_await_region(self._native, mapping.native)
        while lib.worker_awaited(self._native):
            self._turn()
        lib.worker_pause(self._native, 0)

    @contextmanager
    def _quiesced(self, is_late: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Fetch nothing new; what is in flight has ended at the beginning. Raises: TimeoutError if it *is_late()*."""
        lib.worker_pause(self._native, 1)
        try:
            self._finish_all(is_late)
            yield
        finally:
            lib.worker_pause(self._native, 0)

    def _await_quiet(self, is_late: Callable[[], bool]) -> None:
        """Serve on until no operation of Python's is under way, if that is soon: requests need not wait for those."""
        for _ in range(QUIET_TURNS):
            if is_late() or not (self._operations.in_flight or self._computing):
                return
            self._turn()

    def _finish_all(self, is_late: Callable[[], bool] = lambda: False) -> None:
        while lib.worker_requests_in_flight(self._native) or self._operations.in_flight or self._computing:
            if is_late():
                raise TimeoutError
            self._turn()

    def _drain(self) -> None:
        for index in self._queues - self._draining.keys():
            self.drain_queue(index, lambda base: None)
        while self._draining or self._operations.in_flight or self._computing:
            self._turn()
        self._stopping = True

    def _close(self) -> None:
        with self._lock:
            self._open = False
        self._pool.shutdown()
        self._host_pool.shutdown()
        if self._native:
            lib.worker_close(self._native)
        for mapping in [*self._mappings.values(), *([self._log] if self._log else [])]:
            mapping.close()
        if self._inflight is not None:
            self._inflight.close()
        self._host.close(self._control)
        while self._calls:
            _, future = self._calls.popleft()
            if future is not None:
                future.set_exception(RuntimeError("the worker has ended"))


def look_at(fd: int, direct_fd: int = -1) -> Pointer:
    """What a worker has to know of a file; on any thread but its own, since a file may hang."""
    traits: Pointer = ffi.new("struct file_traits *")
    lib.worker_look_at(fd, direct_fd, traits)
    return traits


def _run(future: "Future[T]", function: Callable[[], T]) -> None:
    """What a pool does, but for work that was cancelled: a resize of a file, done late, would cut it off."""
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)


def _refused(_: Callable[[], T]) -> "Future[T]":
    future: Future[T] = new_future()
    future.set_exception(OSError(errno.EAGAIN, "no thread to be had for a file that may hang"))
    return future


def _computed(function: Callable[[], T]) -> "Future[T]":
    future: Future[T] = new_future()
    try:
        future.set_result(function())
    except Exception as error:  # as a pool does
        future.set_exception(error)
    return future
