"""A block device on a worker, and a driver in front of it, in one process: what the data plane's tests stand on."""

import io
import itertools
import os
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import NamedTuple

from bench.driver import Buffer, Completion, DriverMemory, DriverQueue, IdentityMap
from ring.aio import Aio, WorkerOptions
from ring.counter import Counters
from ring.memory import MemoryRegion
from ring.request import Request
from ring.worker import Worker
from tests.patience import TIMEOUT
from virtio.native import NativeBlock

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13  # virtio 1.2, 5.2.6
OK, IOERR, UNSUPP = 0, 1, 2
UNTOUCHED = 0xA5  # what guest buffers hold before the device writes them
MIB = 1 << 20


class Answer(NamedTuple):
    """How a request came back."""

    status: int
    nbytes: int  # written, as the used element says
    data: bytes


class Posted(NamedTuple):
    """Where a request's answer will be."""

    head: int
    data_address: int
    data_nbytes: int
    status_address: int


def cut(guest_address: int, nbytes: int, cuts: Iterable[int], is_writable: bool) -> list[Buffer]:
    """Describe a run of guest memory by buffers that end at *cuts* (offsets in the run)."""
    edges = sorted({0, nbytes, *(edge for edge in cuts if 0 < edge < nbytes)})
    return [Buffer(guest_address + start, end - start, is_writable) for start, end in itertools.pairwise(edges)]


def open_pipe() -> tuple[io.FileIO, io.FileIO]:
    """A file whose reads wait until the other end is fed or closed: (source, feed).

    ``with source, Guest(source.fileno()), feed:`` ends also if the test fails with a read in flight.
    """
    reader, writer = os.pipe()
    return io.FileIO(reader, "r"), io.FileIO(writer, "w")


class Guest:
    """A context manager: one worker, one enabled queue, an optional raw file behind the identity map.

    Without *fd* every read and write goes to *on_request*, which by default answers OK at once.
    """

    def __init__(
        self,
        fd: int | None = None,
        *,
        size: int = MIB,
        queue_size: int = 128,
        event_idx: bool = False,
        base: int = 0,
        on_request: Callable[[Request], None] | None = None,
        block: NativeBlock | None = None,
        direct_fd: int = -1,
        mapped: bool = True,
        sync: bool = True,
        poll_us: int = 0,
        aio: Aio = Aio.AUTO,
        regions: Callable[[DriverMemory], list[MemoryRegion]] = lambda memory: [memory.region()],
    ) -> None:
        self.block = block or NativeBlock(size=size, serial="guest", max_range_sectors=32768)
        self.faults: list[str] = []
        self.sync_errors: list[int] = []
        self.slot = -1
        self._fd = fd
        self._direct_fd = direct_fd
        self._mapped = mapped
        self._sync = sync
        self._poll_us = poll_us
        self._aio = aio
        self._regions = regions
        self._size = size
        self._stack = ExitStack()
        self._queue_options = (queue_size, event_idx, base)
        self._on_request = on_request or (lambda request: request.finish(OK))
        self.broken = threading.Event()

    def __enter__(self) -> "Guest":
        queue_size, event_idx, base = self._queue_options
        with ExitStack() as stack:
            self.memory = stack.enter_context(DriverMemory(16 * MIB))
            self.queue = stack.enter_context(DriverQueue(self.memory, queue_size, event_idx=event_idx, base=base))
            self.worker = stack.enter_context(
                Worker(
                    self.block,
                    self._on_request,
                    WorkerOptions(self._aio, self._poll_us),
                    on_queue_broken=self._note_fault,
                )
            )
            self.worker.call(self._set_up)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def _note_fault(self, index: int, fault: str) -> None:
        self.faults.append(fault)
        self.broken.set()

    def _set_up(self) -> None:
        if self._fd is not None:
            self.slot = self.worker.add_file(
                self._fd, direct_fd=self._direct_fd, sync=self._sync, on_sync_failed=self.sync_errors.append
            )
            self.block.set_sync_slot(self.slot)
            self._map = IdentityMap(slot=self.slot, nbytes=self._size, writable=True)
            if self._mapped:
                self.block.set_extent_map(self._map.extent_map)
        self.regions = self._regions(self.memory)
        self.worker.set_memory(self.regions)
        self.start_queue(0, self.queue)

    def start_queue(self, index: int, queue: DriverQueue) -> None:
        """Give the worker *queue* and enable it; on the worker thread."""
        self.worker.set_err(index, os.dup(queue.err_fd))
        self.worker.set_call(index, os.dup(queue.call_fd))
        self.worker.start_queue(index, queue.layout)
        self.worker.set_kick(index, os.dup(queue.kick_fd))
        self.worker.enable_queue(index)

    # requests

    def post(
        self,
        type: int,
        sector: int = 0,
        *,
        data: bytes = b"",
        room: int = 0,
        cuts: Sequence[int] = (),
        indirect: bool = False,
        align: int = 16,
        queue: DriverQueue | None = None,
    ) -> Posted:
        """Post a request with readable *data* or writable *room*, its parts cut at *cuts*; not yet published."""
        readable = struct.pack("<IIQ", type, 0, sector) + data
        header_address = self.memory.allocate(len(readable) + align, align=align) + (-16 % align)
        data_address = self.memory.allocate(room + 1, align=align)
        self.memory.store(header_address, readable)
        self.memory.store(data_address, bytes([UNTOUCHED]) * (room + 1))
        buffers = cut(header_address, len(readable), [16, *cuts], False)
        buffers += cut(data_address, room + 1, [room, *cuts], True)
        table_address = self.memory.allocate(16 * len(buffers)) if indirect else None
        head = (queue or self.queue).add(buffers, table_address=table_address)
        return Posted(head, data_address, room, data_address + room)

    def answer(self, posted: Posted, completion: Completion) -> Answer:
        """What the device made of *posted*."""
        assert completion.head == posted.head
        data = self.memory.load(posted.data_address, posted.data_nbytes)
        return Answer(self.memory.load(posted.status_address, 1)[0], completion.nbytes, data)

    def ask(
        self,
        type: int,
        sector: int = 0,
        *,
        data: bytes = b"",
        room: int = 0,
        cuts: Sequence[int] = (),
        indirect: bool = False,
        align: int = 16,
    ) -> Answer:
        """Post one request, kick and wait for its answer."""
        posted = self.post(type, sector, data=data, room=room, cuts=cuts, indirect=indirect, align=align)
        self.queue.kick()
        return self.answer(posted, self.queue.wait()[0])

    def ask_all(self, posted: Sequence[Posted]) -> list[Answer]:
        """Kick once and wait for all of *posted*, in whatever order they come back."""
        self.queue.kick()
        completions = {completion.head: completion for completion in self.queue.wait(len(posted))}
        return [self.answer(each, completions[each.head]) for each in posted]

    def wait_for_requests(self, count: int) -> None:
        """Return once the device has fetched *count* requests: draining would leave the rest in the ring."""
        while self.counters.requests < count:
            self.worker.call(lambda: None)

    def drain(self, index: int = 0) -> int:
        """Drain a queue and wait for its base."""
        drained: list[int] = []
        done = threading.Event()

        def finish(base: int) -> None:
            drained.append(base)
            done.set()

        self.worker.call(lambda: self.worker.drain_queue(index, finish))
        assert done.wait(TIMEOUT)
        return drained[0]

    def disable(self, index: int = 0) -> None:
        """Disable a queue and wait until nothing of it is in flight."""
        done = threading.Event()
        self.worker.call(lambda: self.worker.disable_queue(index, done.set))
        assert done.wait(TIMEOUT)

    @property
    def counters(self) -> Counters:
        return self.worker.counters
