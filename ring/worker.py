"""One thread that serves a device's queues: batches in, batches out.

The worker thread owns the rings, the io_uring and everything that `Request`s and operations touch. It lives in
`worker_run`, without the GIL, until C has something for Python; then one batch of events is dispatched here, then
the functions that other threads posted are run, then it goes back. "Worker thread" in a docstring means: only from
`on_request`, from a `done`, or from a function given to `call`.
"""

import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_any
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol, TypeVar

from ring.aio import PLAIN, Aio, WorkerOptions
from ring.counter import Counters
from ring.files import Files
from ring.host import HOST, Host
from ring.memory import Mapping, MemoryRegion, map_regions, native_table
from ring.native import NULL, Pointer, check, ffi, lib
from ring.operations import Operations
from ring.pools import Outcome, Pools
from ring.queues import Queues
from ring.request import Request
from ring.statistics import Statistics
from ring.statistics import snapshot as statistics_snapshot
from ring.thread import new_future, start_deaf

T = TypeVar("T")

NUDGE_SECONDS = 0.1  # between the nudges of one who waits for the worker thread
QUIET_TURNS = 256  # of the loop, until requests are held up though work that they do not wait for is under way

EVENT = struct.Struct("=IiQIIQQ")  # struct worker_event: kind, result, id, type, flags, offset, nbytes
REQUEST, DONE, CONTROL, DRAINED, BROKEN, SYNC_FAILED, IDLE, QUIET, ROOM = range(1, 10)  # enum worker_event_kind


class NativeDevice(Protocol):
    """A device's half in C: parses each popped chain, serves it or punts (`virtio.native.NativeBlock`)."""

    @property
    def native(self) -> Pointer:
        """Its `struct device`, valid as long as this object."""


class Worker(Queues, Files):
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
        Queues.__init__(self, on_queue_broken)
        Files.__init__(self)
        self.aio = options.aio
        self._options = options
        self.io_uring_refusal: OSError | None = None
        self._device = device
        self._on_request = on_request
        self._on_death = on_death
        self._host = host
        self._pools = Pools(host, self._wake, self.post)
        self.await_future = self._pools.await_future  # for the worker thread
        self.tell = self._pools.tell  # from any thread
        self._thread = threading.Thread(target=self._main, name="worker", daemon=True)
        self._started: Future[None] = new_future()
        self._lock = threading.Lock()  # guards _open, and the control fd while it is written
        self._open = False
        self._calls: deque[tuple[Callable[[], Any], Future[Any] | None]] = deque()
        self._stopping = False
        self._death: BaseException | None = None
        self._control = -1
        self._native: Pointer = NULL
        self._counters: Pointer = ffi.new("struct worker_counters *")
        self._mappings: dict[MemoryRegion, Mapping] = {}

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
    def native(self) -> Pointer:
        """For the device's half in C, on the worker thread."""
        return self._native

    @property
    def counters(self) -> Counters:
        """What was counted so far; also after `stop`."""
        return Counters(self._counters)

    @property
    def statistics(self) -> Statistics:
        """How long things took so far; also after `stop`."""
        native: Any = lib.worker_statistics(self._native)
        return statistics_snapshot(native)

    # worker thread: what waits for everything; what else a front-end asks for is in `Queues`

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

    def quiesce(self) -> None:
        """Return once no request and no operation is under way. For functions given to `call` only."""
        with self._quiesced():
            pass

    def run_alone(
        self,
        begin: Callable[[Callable[[T], None]], None],
        is_late: Callable[[], bool],
        prepare: Callable[[Callable[[Any], None]], None] = lambda done: done(None),
    ) -> T:
        """Call *begin(done)* once no request and no operation is under way -> what *done* is given, whenever it is.

        Requests wait meanwhile, those of all queues, and until what was begun beside has ended; not yet from when
        *prepare(done)* is called until it has called that. For functions given to `call` and `call_patiently` only.
        Raises: TimeoutError if *is_late()* before it has begun.
        """
        results: list[T] = []
        prepared: list[Any] = []
        prepare(prepared.append)
        while not prepared:
            if is_late():
                raise TimeoutError
            self._turn()
        self._await_quiet(is_late)
        with self._quiesced(is_late):
            begin(results.append)
            while not results:
                self._turn()
            self._finish_all()
        return results[0]

    # worker thread: work beside it; the files, and what is done with them, are in `Files`

    def compute(self, function: Callable[[], T], done: Outcome[T]) -> None:
        """Run *function* on a pool thread, or here without one, then *done(result, error)* on the worker thread."""
        self._pools.compute(function, done)

    def call_host(self, function: Callable[[], T], done: Outcome[T]) -> None:
        """The same for one that may hang, and holds up no computation; without a thread it fails with EAGAIN."""
        self._pools.call_host(function, done)

    def _wake(self) -> None:
        self._host.signal(self._control)  # open: `_drain` waits for what is being computed

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
        except BaseException as death:  # raised by `stop`
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
                self._pools.deliver()
            elif kind == DRAINED:
                self._drained(number, result & 0xFFFFFFFF)
            elif kind == QUIET:
                self._disabled(number)
            elif kind == BROKEN:
                self._broke(number)
            elif kind == SYNC_FAILED:
                self._sync_failed(number, -result)
        self._operations.begin_waiting()  # for ROOM there is nothing else to do

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
            if is_late() or not (self._operations.in_flight or self._pools.under_way):
                return
            self._turn()

    def _finish_all(self, is_late: Callable[[], bool] = lambda: False) -> None:
        while lib.worker_requests_in_flight(self._native) or self._operations.in_flight or self._pools.under_way:
            if is_late():
                raise TimeoutError
            self._turn()

    def _drain(self) -> None:
        for index in self._queues - self._draining.keys():
            self.drain_queue(index, lambda base: None)
        while self._draining or self._operations.in_flight or self._pools.under_way:
            self._turn()
        self._stopping = True

    def _close(self) -> None:
        with self._lock:
            self._open = False
        self._pools.close()
        if self._native:
            lib.worker_close(self._native)
        for mapping in [*self._mappings.values(), *self._shared_memory()]:
            mapping.close()
        self._host.close(self._control)
        while self._calls:
            _, future = self._calls.popleft()
            if future is not None:
                future.set_exception(RuntimeError("the worker has ended"))
