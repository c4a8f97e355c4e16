"""A guest: it posts requests on its rings when it likes, and judges the answers."""

import os
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from bench.driver import DriverMemory
from ring.inflight import InflightRegion, inflight_nbytes
from ring.memory import Mapping, MemoryRegion
from ring.native import NULL, ffi, lib
from ring.virtqueue import QueueLayout
from ring.worker import Worker
from tests.crash.history import SECTOR, ZEROS, Flush, History, Version, pattern
from tests.sim.kernel import MS, US, Kernel
from tests.sim.liveness import AFTERMATH, Liveness
from tests.sim.trouble import Violation
from virtio.block import UNMAP, RequestType, Status

EMPTY, FULL = -11, -28  # -EAGAIN, -ENOSPC
DATA_NBYTES = 16 * 1024  # of a request, at most
TABLE_NBYTES = 16 * 32
SHIFTS = (1, 4, 8)  # bytes, which leave data less aligned than the simulated O_DIRECT wants
SLOT_NBYTES = 32 + TABLE_NBYTES + DATA_NBYTES + max(SHIFTS)
PATIENCE = 20_000 * MS  # a request that takes longer, once the world is kind, is lost
HEADER = struct.Struct("<IIQ")
RANGE = struct.Struct("<QII")
MIXES = {
    "plane": {"write": 48, "read": 18, "flush": 12, "discard": 8, "zero": 8, "keep": 6},
    "clear": {"write": 36, "read": 10, "flush": 10, "discard": 24, "zero": 10, "keep": 10},
    "spread": {"write": 64, "read": 10, "flush": 16, "discard": 6, "zero": 2, "keep": 2},
    "settle": {"write": 48, "read": 6, "flush": 36, "discard": 4, "zero": 4, "keep": 2},
    "scan": {"write": 12, "read": 80, "flush": 3, "discard": 3, "zero": 1, "keep": 1},
}
NEAR = 8  # sectors
WIDE = ("spread", "scan")  # aim at the whole disk: most clusters are met for the first time


@dataclass(frozen=True)
class Setup:
    """What a guest is like."""

    num_queues: int
    size: int
    packed: bool
    event_idx: bool
    indirect: bool
    depth: int  # requests in flight on a queue, at most
    requests: int
    nsectors: int  # of the disk
    hot: int  # sectors, of which most requests want some
    near: float  # how often a request wants what is near the last one's, of 1
    cluster_sectors: int
    mix: dict[str, int]  # kinds of requests, and how often of their sum
    calm: int  # more requests, once the world is kind
    polled: bool  # the first queue's driver never kicks
    crooked: float  # how often data lies where O_DIRECT does not take it, of 1


@dataclass
class Asked:
    """A request in flight."""

    number: int
    kind: str
    sector: int
    nsectors: int
    begun: int  # position in the journal
    posted_at: int
    slot: int
    shift: int = 0  # of the data in it, in bytes
    overtaken: int = 0
    versions: list[Version] = field(default_factory=list)
    flush: Flush | None = None


class Queue:
    """One ring, with buffers for as many requests as it takes."""

    def __init__(self, memory: DriverMemory, setup: Setup) -> None:
        self.setup = setup
        self.memory = memory
        base = 0x80008000 if setup.packed else 0
        nbytes = lib.driver_ring_nbytes(setup.size)
        self.address = memory.allocate(nbytes, align=64)
        self.ring: Any = ffi.new("struct driver_ring *")
        flags = lib.RING_EVENT_IDX * setup.event_idx | lib.RING_PACKED * setup.packed
        lib.driver_ring_init(self.ring, memory.host(self.address, nbytes), setup.size, flags, base)
        self.slots = [memory.allocate(SLOT_NBYTES, align=512) for _ in range(setup.depth)]
        self.free = list(range(len(self.slots)))
        self.asked: dict[int, Asked] = {}  # by head
        self.base = base  # for the next daemon, if the last one has said it
        self.kick_fd = self.call_fd = self.err_fd = -1

    def layout(self, *, base: int) -> QueueLayout:
        return QueueLayout(
            size=self.setup.size,
            descriptor_address=self.address,
            driver_address=self.address + lib.driver_ring_driver_offset(self.setup.size),
            device_address=self.address + lib.driver_ring_device_offset(self.setup.size),
            base=base,
            event_idx=self.setup.event_idx,
            packed=self.setup.packed,
        )

    def used_index(self) -> int:
        """As the front-end finds it where a daemon has died."""
        at = self.address + lib.driver_ring_device_offset(self.setup.size) + 2
        return int.from_bytes(self.memory.load(at, 2), "little")


class Guest:
    """The driver, its memory and the front-end's in-flight region; it outlives a killed daemon."""

    def __init__(self, kernel: Kernel, setup: Setup, history: History, first_request: int) -> None:
        self.kernel = kernel
        self.setup = setup
        self.history = history
        self.requests = first_request
        self.left = setup.requests
        self.waits = (2, 20, 200)  # microseconds, between two looks of a queue's driver
        self.liveness = Liveness(kernel)
        self.random = random.Random(kernel.random.getrandbits(63))
        self.memory = DriverMemory(1 << 20, guest_address=1 << 20)
        self.queues = [Queue(self.memory, setup) for _ in range(setup.num_queues)]
        self.inflight_bytes = inflight_nbytes(setup.num_queues, setup.size, packed=setup.packed)
        self.inflight_fd = os.memfd_create("in-flight", os.MFD_CLOEXEC)
        os.truncate(self.inflight_fd, self.inflight_bytes)
        self._inflight = Mapping(MemoryRegion(os.dup(self.inflight_fd), 0, 0, self.inflight_bytes, 0))
        self.control_fd = -1
        self.is_closing = False
        self.answered = self.refused = 0
        self.aimed = 0
        self.started = False

    def close(self) -> None:
        self.memory.close()
        self._inflight.close()
        os.close(self.inflight_fd)

    # the front-end

    def photograph(self) -> tuple[bytes, bytes]:
        """What other processes would find in shared memory now."""
        inflight: Any = self._inflight.address
        return self.memory.load(1 << 20, self.memory.nbytes), bytes(ffi.buffer(inflight, self.inflight_bytes))

    def restore(self, photograph: tuple[bytes, bytes]) -> None:
        """What a dead worker has done since then was not done."""
        for queue in self.queues:  # a packed ring has no such index: the in-flight region says where it stands
            queue.base = 0x80008000 if self.setup.packed else -1
        self.memory.store(1 << 20, photograph[0])
        ffi.memmove(self._inflight.address, photograph[1], self.inflight_bytes)

    def connect(self, worker: Worker) -> None:
        """Give *worker* the rings."""
        self.liveness.trouble()
        region = InflightRegion(os.dup(self.inflight_fd), 0, self.inflight_bytes, self.setup.num_queues)
        worker.set_memory([self.memory.region()])
        worker.set_inflight(region)
        for index, queue in enumerate(self.queues):
            if queue.base < 0:
                queue.base = queue.used_index()
            self._start(worker, index, queue)
        self.started = True
        for queue in self.queues:
            self._later(queue)

    def _start(self, worker: Worker, index: int, queue: Queue) -> None:
        kernel = self.kernel
        queue.kick_fd, queue.call_fd, queue.err_fd = (kernel.eventfd() for _ in range(3))
        queue.kick_fd = -1 if self.setup.polled and index == 0 else queue.kick_fd
        kernel.listeners[queue.call_fd] = lambda: self._harvest(queue)
        worker.set_err(index, queue.err_fd)
        worker.set_kick(index, None if queue.kick_fd < 0 else queue.kick_fd)
        worker.set_call(index, queue.call_fd)
        worker.start_queue(index, queue.layout(base=queue.base))
        worker.enable_queue(index)

    # the driver

    @property
    def is_done(self) -> bool:
        return self.left == 0 and self.liveness.is_kind and not any(queue.asked for queue in self.queues)

    def _calm(self) -> None:
        """The troubles of this life end; once nothing is left of them a few more requests are made."""
        self.liveness.calm(one for queue in self.queues for one in queue.asked.values())
        self.kernel.at(AFTERMATH, self._go_on)

    def _go_on(self) -> None:
        self.liveness.be_kind()
        self.left = self.setup.calm
        for queue in self.queues:
            self._later(queue)

    def _later(self, queue: Queue) -> None:
        self.kernel.at(self.random.choice(self.waits) * US, lambda: self._act(queue))

    def _act(self, queue: Queue) -> None:
        """Post a few requests, if there is room, and kick."""
        for _ in range(self.random.choice((1, 1, 2, 4))):
            if not self.left or not queue.free or not self._post(queue):
                break
        if lib.driver_ring_publish(queue.ring) and queue.kick_fd >= 0:
            lib_delay = self.random.randrange(100, 20 * US)
            self.kernel.at(lib_delay, lambda: lib.sim_raise(queue.kick_fd))
        if self.left and queue.free:
            self._later(queue)

    def _post(self, queue: Queue) -> bool:
        """Post a request; False: the ring is full."""
        kind = self.random.choices([*self.setup.mix], [*self.setup.mix.values()])[0]
        sector, nsectors = self._aim(kind)
        at = self.random.randrange(len(queue.free))
        is_crooked = self.setup.crooked and self.random.random() < self.setup.crooked
        shift = self.random.choice(SHIFTS) if is_crooked else 0
        asked = Asked(self.requests + 1, kind, sector, nsectors, 0, self.kernel.now, queue.free[at], shift)
        head = self._add(queue, asked)
        if head == FULL:
            return False
        if head < 0 or head in queue.asked:
            raise Violation(f"the driver was given head {head}")
        asked.begun = self.kernel.mark(("begin", asked.number, kind, sector, nsectors))
        self._note(asked)
        self.left -= 1
        self.requests += 1
        del queue.free[at]
        queue.asked[head] = asked
        if not self.left and not self.liveness.is_calm:
            self._calm()
        return True

    def _aim(self, kind: str) -> tuple[int, int]:
        if kind == "flush":
            return 0, 0
        whole = self.setup.cluster_sectors
        if kind in ("discard", "zero", "keep") and whole <= DATA_NBYTES // SECTOR and self.random.random() < 0.5:
            return self.random.randrange(self.setup.hot // whole) * whole, whole
        reach = self.setup.hot if self.random.random() < 0.85 else self.setup.nsectors
        most = DATA_NBYTES // SECTOR if self.random.random() < 0.3 else 6
        sector = self.random.randrange(reach)
        if self.setup.near and self.random.random() < self.setup.near:
            sector = min(max(0, self.aimed + self.random.randint(-NEAR, NEAR)), self.setup.nsectors - 1)
        self.aimed = sector
        return sector, self.random.randrange(1, 1 + min(most, self.setup.nsectors - sector))

    def _note(self, asked: Asked) -> None:
        sectors = range(asked.sector, asked.sector + asked.nsectors)
        if asked.kind == "write":
            asked.versions = self.history.begin({s: pattern(asked.number, s) for s in sectors}, asked.begun)
        elif asked.kind in ("zero", "keep", "discard"):
            binding = asked.kind != "discard"
            asked.versions = self.history.begin(dict.fromkeys(sectors, ZEROS), asked.begun, binding=binding)
        elif asked.kind == "flush":
            asked.flush = Flush(asked.begun)
            self.history.flushes.append(asked.flush)

    def _add(self, queue: Queue, asked: Asked) -> int:
        header = queue.slots[asked.slot]
        status, table, data = header + 16, header + 32, header + 32 + TABLE_NBYTES + asked.shift
        memory = self.memory
        memory.store(status, b"\xaa")
        nbytes, is_writable = asked.nsectors * SECTOR, asked.kind == "read"
        types = {"write": RequestType.OUT, "read": RequestType.IN, "flush": RequestType.FLUSH}
        types |= {"discard": RequestType.DISCARD, "zero": RequestType.WRITE_ZEROES, "keep": RequestType.WRITE_ZEROES}
        is_range = asked.kind in ("discard", "zero", "keep")
        memory.store(header, HEADER.pack(types[asked.kind], 0, 0 if is_range else asked.sector))
        if asked.kind == "write":
            sectors = range(asked.sector, asked.sector + asked.nsectors)
            memory.store(data, b"".join(pattern(asked.number, sector) for sector in sectors))
        elif asked.kind == "read":
            memory.store(data, b"\xdd" * nbytes)
        elif is_range:
            memory.store(data, RANGE.pack(asked.sector, asked.nsectors, UNMAP if asked.kind == "zero" else 0))
            nbytes = RANGE.size
        buffers = [(header, 16, False), *self._pieces(data, nbytes, is_writable), (status, 1, True)]
        native = ffi.new("struct driver_buffer[]", buffers)
        if self.setup.indirect and self.random.random() < 0.7:
            host = memory.host(table, 16 * len(buffers))
            return int(lib.driver_ring_add(queue.ring, native, len(buffers), host, table))
        return int(lib.driver_ring_add(queue.ring, native, len(buffers), NULL, 0))

    def _pieces(self, start: int, nbytes: int, is_writable: bool) -> Iterator[tuple[int, int, bool]]:
        """The data in up to four buffers."""
        while nbytes:
            run = min(nbytes, self.random.choice((SECTOR, 4 * SECTOR, DATA_NBYTES, DATA_NBYTES)))
            if nbytes - run and self.random.random() < 0.5:
                run = nbytes
            run = max(run, nbytes - 15 * SECTOR) if nbytes > 16 * SECTOR else run
            yield start, run, is_writable
            start, nbytes = start + run, nbytes - run

    def _harvest(self, queue: Queue) -> None:
        """The call came: take what is done; ask to be called again."""
        written = ffi.new("uint32_t *")
        while True:
            head = lib.driver_ring_poll(queue.ring, written)
            if head == EMPTY:
                if not lib.driver_ring_arm(queue.ring):
                    break
                continue
            if head not in queue.asked:
                raise Violation(f"head {head} came back, which was not posted")
            self._answered(queue, queue.asked.pop(head))
        if self.left:
            self._later(queue)
        if self.is_done and not self.is_closing:
            self.is_closing = True
            self.kernel.at(10 * US, lambda: lib.sim_raise(self.control_fd))

    def _answered(self, queue: Queue, asked: Asked) -> None:
        header = queue.slots[asked.slot]
        queue.free.append(asked.slot)
        status = self.memory.load(header + 16, 1)[0]
        position = self.kernel.mark(("end", asked.number, status, self.kernel.now))
        self.answered += 1
        others = [one for other in self.queues if other is not queue for one in other.asked.values()]
        self.liveness.answered(asked, others)
        if status != Status.OK:
            self.refused += 1
            is_old = asked.begun < self.kernel.life_began and self.kernel.ever_failed  # the answer is the last life's
            if status != Status.IOERR or not (self.kernel.failures or is_old):
                raise Violation(f"request {asked.number} ({asked.kind}) ends with status {status}")
            return
        if self.kernel.now - asked.posted_at > PATIENCE:
            raise Violation(f"request {asked.number} took {self.kernel.now - asked.posted_at} ns")
        for version in asked.versions:
            version.acked = position
        if asked.flush is not None:
            failed_at = self.kernel.sync_failed_at
            if failed_at is not None and asked.begun > failed_at:
                raise Violation(f"flush {asked.number} succeeds after a failed sync")
            asked.flush.acked = position
        if asked.kind == "read":
            self._judge_read(asked, header + 32 + TABLE_NBYTES + asked.shift, position)

    def _judge_read(self, asked: Asked, address: int, position: int) -> None:
        content = self.memory.load(address, asked.nsectors * SECTOR)
        self.kernel.note("read", content)
        for index in range(asked.nsectors):
            found = content[index * SECTOR : (index + 1) * SECTOR]
            if found not in self.history.shown(asked.sector + index, asked.begun, position):
                raise Violation(f"read {asked.number}: sector {asked.sector + index} shows {found[:16]!r}")
