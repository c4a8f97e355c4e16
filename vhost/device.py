"""The device of one daemon: its worker, what it offers, and its size, which may grow while a guest uses it."""

import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from types import TracebackType

from ring.aio import PLAIN, WorkerOptions
from ring.memory import REGIONS_MAX
from ring.worker import Worker
from vhost.problem import Told
from vhost.session import Offer, Session
from virtio.block import Backend, Unavailable
from virtio.config import MAX_RANGE_SECTORS, block_config
from virtio.feature import offered_features
from virtio.native import NativeBlock

SOFTWARE_ERROR = 70  # EX_SOFTWARE
PATIENCE_SECONDS = 10.0  # for requests under way, while all others wait
NO_MEMORY = b"vhost-user-qcow2: out of memory\n"  # made in time

log = logging.getLogger("vhost")


Begin = Callable[[Callable[[str], None]], None]  # is given what takes its refusal, or nothing


class ResizeRefused(Exception):
    """The disk keeps its size; one line says why."""


class Device:
    """A backend on a worker of its own; a context manager: leaving it drains the worker and detaches the backend.

    What is under the backend is held while a ring runs, and from the start, if it is then, until rings have stopped
    for the first time: another process may have it in between.

    What is for any thread says so; the rest is the control thread's.
    """

    def __init__(self, backend: Backend, *, num_queues: int, writeback: bool, worker: WorkerOptions = PLAIN) -> None:
        self.backend = backend
        self.block = _native_block(backend)
        self.worker = Worker(
            self.block,
            backend.start,
            worker,
            on_queue_broken=self._tell_of_broken_queue,
            on_death=die,
        )
        self.changed_fd = -1  # readable after `offer` has changed
        self.told = Told()  # on the control thread
        self._told_of_queues = Told()  # on the worker
        self._num_queues = num_queues
        self._writeback = writeback
        self.is_attached = False
        self.is_alone = False  # on the worker: all requests are awaited, or none is served
        self.session: Session | None = None  # of the front-end that is here
        self.on_alone: Callable[[], None] = lambda: None  # on the worker, before it awaits all that is under way
        self.on_shared: Callable[[], None] = lambda: None  # on the worker, once work may go on beside requests
        self._was_taken = False
        self._lock = threading.Lock()  # guards what is done to the backend as a whole
        self._offer = self._current_offer()
        self._stack = ExitStack()

    def __enter__(self) -> "Device":
        with ExitStack() as stack:
            self.changed_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            stack.callback(os.close, self.changed_fd)
            stack.enter_context(self.worker)
            if self.worker.io_uring_refusal is not None:
                log.warning("io_uring is not to be had: %s; using threads", self.worker.io_uring_refusal.strerror)
            stack.callback(self._detach)
            if self.backend.lease is None or self.backend.lease.is_held:
                self._attach()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def offer(self) -> Offer:
        """What a front-end is offered now."""
        return self._offer

    def look(self) -> None:
        """Bring the offer up to date for a front-end that is about to come.

        Raises: Unavailable.
        """
        with self._lock:
            if not self.is_attached and self.backend.lease is not None:
                self.backend.lease.look()
                self._offer = self._current_offer()

    def take(self) -> None:
        """Take hold of what is under the backend: a ring is about to run.

        Raises: Unavailable.
        """
        with self._lock:
            self._was_taken = True
            self._attach()

    def admit(self, memory: set[tuple[int, int]], new: set[tuple[int, int]]) -> None:
        """Before requests of a guest whose *memory* is in the files of these numbers, device and inode.

        Some are *new* since the last time.

        Raises: Unavailable.
        """
        with self._lock:
            if self.is_attached and self.backend.lease is not None:
                self.backend.lease.admit(memory, new)

    def let_go(self) -> None:
        """Leave it to others, if it was ever taken: no ring runs."""
        with self._lock:
            if self._was_taken:
                self._let_go()

    def settle(self, done: Callable[[], None]) -> None:
        """On the worker: *done()* once files alone hold all that has completed, as they do while nothing is attached.

        A backend that cannot settle has said so, and takes no more writes.
        """
        if self.is_attached:
            self.backend.settle(lambda _result: done())
        else:
            done()

    def _attach(self) -> None:
        if self.is_attached:
            return
        if self.backend.lease is not None:
            self.backend.lease.take()
        self.worker.call(self._attach_backend)
        self._offer = self._current_offer()
        self.block.set_size(self.backend.properties.size)  # no request is there that could ask for it

    def _let_go(self) -> None:
        if self.backend.lease is not None:
            self._detach()
            self.backend.lease.let_go()

    def _attach_backend(self) -> None:
        """On the worker, which alone changes `is_attached`: what it runs next may rely on it."""
        self.backend.attach(self.worker, self.block)
        self.is_attached = True
        self._share()

    def _detach(self) -> None:
        if self.is_attached:
            self.worker.call(self._quiesce_and_detach)

    def _quiesce_and_detach(self) -> None:
        self._be_alone()
        self.worker.quiesce()
        self.is_attached = False
        self.backend.detach()

    def resize(self, nbytes: int, patience: float = PATIENCE_SECONDS) -> None:
        """Let the disk be *nbytes* long, rounded up to a sector, and tell the front-end; stable on return. Any thread.

        Requests wait until it is done, and none is lost; where all that is new is written they go on between pieces.
        The guest sees the new size once its driver reads it.
        Raises: ResizeRefused, also if those under way have not ended after *patience* seconds: the others go on then.
        """
        try:
            with self.holding():
                refusal = self._grow(nbytes, patience)
        except Unavailable as unavailable:
            raise ResizeRefused(str(unavailable)) from unavailable
        if refusal:
            raise ResizeRefused(refusal)
        os.eventfd_write(self.changed_fd, 1)

    def _grow(self, nbytes: int, patience: float) -> str:
        """As far as it goes; -> why no further."""
        first = before = self.backend.properties.size
        while True:
            refusal = self.alone(lambda done: self.backend.grow(nbytes, done), patience)
            size = self.backend.properties.size
            if refusal and size > first:
                os.eventfd_write(self.changed_fd, 1)
                return f"{refusal}; the disk has {size} bytes now"
            if refusal or not before < size < nbytes:
                return refusal
            before = size

    def alone(self, begin: Begin, patience: float = PATIENCE_SECONDS) -> str:
        """*begin(done)*, on the worker, while requests wait and none is under way; -> what *done* is given.

        Stable is what *begin* says it is. While `holding`. Where requests under way have not ended after *patience*
        seconds nothing is begun, and the others go on.
        """
        refusal = _alone(self.worker, lambda is_late: self._change(begin, is_late), patience)
        self._offer = self._current_offer()
        return refusal

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Nobody takes what is under the backend, or lets it go, meanwhile; it is held. For any thread.

        Raises: Unavailable.
        """
        with self._lock:
            was_attached = self.is_attached
            self._attach()
            try:
                yield
            finally:
                if not was_attached:
                    self._let_go()

    @contextmanager
    def keeping(self) -> Iterator[bool]:
        """Nobody takes what is under the backend, or lets it go, meanwhile; whether it is held. For any thread."""
        with self._lock:
            yield self.is_attached

    def exchange(
        self,
        begin: Begin,
        swap: Callable[[], None],
        on_attached: Callable[[], None],
        patience: float = PATIENCE_SECONDS,
    ) -> str:
        """While requests wait and none is under way: *begin(done)*, then *swap()* with the backend detached.

        *on_attached()* comes before the first request of what was swapped in. All three on the worker.
        What *done* is given is returned; unless that is empty nothing is swapped. While `holding`, or `keeping` what is
        held. Where requests under way have not ended after *patience* seconds nothing is begun, and the others go on.
        """
        return _alone(self.worker, lambda is_late: self._exchange(begin, swap, on_attached, is_late), patience)

    def _exchange(
        self, begin: Begin, swap: Callable[[], None], on_attached: Callable[[], None], is_late: Callable[[], bool]
    ) -> str:
        with self.block.holding_commits(self.worker):
            refusal = self._run_alone(begin, is_late)
            if not refusal:
                try:
                    self.backend.exchange(swap)
                    on_attached()
                except BaseException as error:  # neither the old nor the new is there; the next process has the new
                    die(error)
        return refusal

    def flush(self, done: Callable[[int], None]) -> None:
        """*done(0 | -errno)*, on the worker, once every write completed before now is stable; one that nobody holds is.

        For any thread.
        """

        def begin() -> None:
            if self.is_attached:
                self.backend.flush(done)
            else:  # it was made stable when it was let go
                done(0)

        self.worker.call(begin)

    def flush_now(self) -> int:
        """The same, and wait for it -> 0 | -errno."""
        outcome: Future[int] = Future()
        self.flush(outcome.set_result)
        return self.worker.wait(outcome)

    def force_writethrough(self, forced: bool) -> None:
        """Make every write stable before it is acknowledged, whatever the guest chose, or leave it to the guest.

        For any thread.
        """
        self.worker.call(lambda: self.block.force_writethrough(forced))

    def _change(self, begin: Begin, is_late: Callable[[], bool]) -> str:
        """On the worker: the refusal, or nothing; the disk may have another size."""
        with self.block.holding_commits(self.worker):
            refusal = self._run_alone(begin, is_late)
        self.block.set_size(self.backend.properties.size)
        return refusal

    def _run_alone(self, begin: Begin, is_late: Callable[[], bool]) -> str:
        """Without a sync that a request waits for: they wait for another one that is over, and for the end of this.

        So however many FLUSHes come, no other request waits for the disk because of them.
        """
        self._be_alone()
        try:
            return self.worker.run_alone(begin, is_late, self.backend.await_syncs)
        finally:
            self._share()

    def _tell_of_broken_queue(self, index: int, fault: str) -> None:
        if self._told_of_queues.is_news(text := f"queue {index} stopped: {fault}"):
            log.warning("%s", text)

    def _be_alone(self) -> None:
        self.is_alone = True
        self.on_alone()

    def _share(self) -> None:
        self.is_alone = False
        self.on_shared()

    def _current_offer(self) -> Offer:
        properties = self.backend.properties
        config = block_config(properties, num_queues=self._num_queues, wce=self._writeback)
        features = offered_features(read_only=properties.read_only)
        return Offer(features, self._num_queues, REGIONS_MAX, config.pack())


def _alone(worker: Worker, function: Callable[[Callable[[], bool]], str], patience: float) -> str:
    """What *function* refuses, which runs on *worker* once nothing is under way, or that it was not to be."""
    try:
        return worker.call_patiently(function, patience)
    except TimeoutError:
        return f"requests under way have not ended within {patience:g} s: does the storage hang?"


def _native_block(backend: Backend) -> NativeBlock:
    properties = backend.properties
    limit = 0 if properties.read_only else MAX_RANGE_SECTORS
    return NativeBlock(
        size=properties.size,
        block_size=properties.block_size,
        read_only=properties.read_only,
        serial=properties.serial,
        max_range_sectors=limit,
    )


def die(error: BaseException) -> None:
    """A thread of ours raised *error*: a bug, or no memory. The process ends loudly, the image as after a crash."""
    try:
        if isinstance(error, MemoryError):
            os.write(2, NO_MEMORY)
        else:
            traceback.print_exception(error)
            sys.stderr.flush()
    finally:  # whoever reads it or not
        os._exit(SOFTWARE_ERROR)
