"""A life in which the chain under a disk changes while a guest uses it: snapshots, streams and commits."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.task import Task
from qcow2.engine.create import Options, create
from qcow2.engine.image import Image
from qcow2.engine.opened import OpenOptions
from qcow2.job.pace import Pace
from qcow2.node.chain import Chain
from qcow2.node.node import Node
from qcow2.plane.linklog import LIMIT, RECORD_BYTES, RECORDS_OFFSET, LinkLog
from ring.aio import Aio, WorkerOptions
from ring.native import lib
from tests.crash.history import SECTOR, SIZE, History, size_sector
from tests.crash.images import LOG_CAPACITY, LOG_NUMBERS, content, read_all
from tests.engine import ORIGIN
from tests.sim.guest import MIXES, Guest, Setup
from tests.sim.kernel import US, Kernel, KernelFile, KernelMemory, Trouble, Violation
from tests.sim.life import Block, SimulatedDriver, World
from tests.sim.livehost import AttachedDevice, Directory, LiveChain, LiveHost, OneThread
from tests.sim.liveness import Liveness, Waiting
from vhost.committing import Committing
from vhost.disk import ImageBackend
from vhost.jobs import Work
from vhost.option import CacheMode
from vhost.overlaybitmaps import OverlayBitmaps
from vhost.snapshot import Pace as NoPace
from vhost.snapshot import Snapshots
from vhost.streaming import Streaming
from virtio.config import MAX_RANGE_SECTORS

TAGS = 64  # of link logs of one image, at most
CLUSTERS = 40


class Unhurried(Liveness):
    """Requests may wait: for a snapshot, for a job's last step."""

    def be_kind(self) -> None:
        """Nobody is asked."""
        self.is_kind = True

    def answered(self, one: Waiting, others: Iterable[Waiting]) -> None:
        """However late."""


@dataclass(frozen=True)
class Frozen:
    """What a snapshot has frozen, and when."""

    path: str
    position: int  # in the journal


class LiveWorld(World):
    """One disk, its guest and what is done to it, all of it drawn from *seed*."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.kernel = Kernel(seed, Trouble(punches=seed % 3 != 0))
        SimulatedDriver.kernel = self.kernel
        self.random = draw = self.kernel.random
        self.writethrough = draw.random() < 0.2
        self.cluster_bits = draw.choice((10, 10, 12))
        self.is_lazy = draw.random() < 0.5
        self._tags = itertools.count(1)
        self._actions: deque[Callable[[], None]] = deque()
        self.frozen: list[Frozen] = []
        self.done: list[str] = []
        self._has_committed = False
        self.guest: Guest | None = None
        chain = self._make_chain()
        names = self._file_at("names")
        self.host = LiveHost(chain, Directory(self.kernel, names, "f1"), self._file_at, self._open_new, self._through)
        self.host.on_frozen = lambda path: self.frozen.append(Frozen(path, len(self.kernel.journal)))
        self.names = names
        top: Any = chain.nodes[0]
        contents = self._through(read_all(top))
        self.history = History(contents, writethrough=self.writethrough, beyond={SIZE: size_sector(len(contents))})
        self.kernel.journal.clear()
        self.kernel.pending.clear()
        self.initial = {file: file.copy() for file in [*chain.files, names]}
        self.memories = {file.memory: bytes(file.memory.content) for file in chain.files}

    # files

    def _file_at(self, path: str) -> KernelFile:
        file = KernelFile(path, {}, 0)
        self.kernel.add_file(file)
        memory = KernelMemory(RECORDS_OFFSET + LOG_CAPACITY * RECORD_BYTES)
        file.memory = memory
        self.kernel.memories.append(memory)
        if hasattr(self, "initial"):  # it comes to be while the chain is served
            self.initial[file] = file.copy()
            self.memories[memory] = bytes(memory.content)
        return file

    def _make_chain(self) -> Chain:
        """A base, and an overlay of it that has something."""
        nbytes = CLUSTERS << self.cluster_bits
        base, top = self._file_at("f0"), self._file_at("f1")
        self._through(create(base, self._options(None)))
        below = self._open_new(base, None)
        self._through(below.write(0, MemoryBuffer(memoryview(content(7, nbytes - 5 * SECTOR)))))
        self._through(below.close())
        self._through(create(top, self._options("f0")))
        base.writable = False
        image = self._open_new(top, self._through(Image.open(base)))
        for index in (1, 5):
            old = content(index, 1 << self.cluster_bits)
            self._through(image.write(index << self.cluster_bits, MemoryBuffer(memoryview(old))))
        self._through(image.flush())
        assert image.backing is not None
        files: Any = [top, base]
        return Chain(files=files, nodes=[image, image.backing])

    def _options(self, below: str | None) -> Options:
        return Options(
            CLUSTERS << self.cluster_bits,
            cluster_bits=self.cluster_bits,
            lazy_refcounts=self.is_lazy,
            backing_name=below,
            backing_format=below and "qcow2",
        )

    def _open_new(self, file: KernelFile, below: Node | None) -> Image:
        first = next(self._tags) * TAGS
        tags = itertools.count(first)
        memory: Any = file.memory
        log = LinkLog(memory, file, ORIGIN, next(tags), LOG_CAPACITY, renew=lambda: next(tags))
        log.native.first = log.native.next = LIMIT - LOG_NUMBERS
        options = OpenOptions(writable=True, cache_size=0)
        opened = self._through(Image.open(file, backing=below, options=options, log=log))
        assert isinstance(opened, Image)
        return opened

    # serving

    def run(self) -> None:
        """All of it. Raises: Violation."""
        try:
            self._live_once()
        finally:
            if self.guest is not None:
                self.guest.close()

    def _live_once(self) -> None:
        block = Block(size=self.host.disk.size, max_range_sectors=MAX_RANGE_SECTORS)
        cache = CacheMode.WRITETHROUGH if self.writethrough else CacheMode.WRITEBACK
        backend = ImageBackend(self.host, cache=cache, driver=SimulatedDriver)
        worker = OneThread(
            block,
            backend.start,
            WorkerOptions(Aio.IO_URING),
            host=self.kernel,
            on_queue_broken=self._tell_of_broken_queue,
        )
        worker.open()
        try:
            block.set_writethrough(self.writethrough)
            backend.attach(worker, block)
            self._serve_all(worker, backend, AttachedDevice(backend, block, worker))
        except OSError:
            if self.kernel.error is None:
                raise
        finally:
            self.kernel.state.dead = 1
            worker.abandon()
            self.kernel.state.dead = 0
        if self.kernel.error is not None:
            raise self.kernel.error
        self._through(self.host.disk.image.close())

    def _serve_all(self, worker: OneThread, backend: ImageBackend, device: AttachedDevice) -> None:
        self.guest = guest = Guest(self.kernel, self._guest_setup(), self.history, 0)
        guest.liveness = Unhurried(self.kernel)
        guest.control_fd = worker.control_fd
        guest.connect(worker)
        self._plan_actions(worker, backend, device)
        while not guest.is_done or self._actions:
            if self._actions:
                self._actions.popleft()()
            else:
                worker.turn()
        self._drain(worker, guest)
        worker.quiesce()
        backend.detach()
        worker.finish()

    def _guest_setup(self) -> Setup:
        draw = self.random
        cluster_sectors = (1 << self.cluster_bits) // SECTOR
        nsectors = CLUSTERS * cluster_sectors
        return Setup(
            num_queues=draw.choice((1, 2)),
            size=64,
            packed=draw.random() < 0.5,
            event_idx=draw.random() < 0.5,
            indirect=draw.random() < 0.6,
            depth=6,
            requests=draw.randrange(40, 90),
            nsectors=nsectors,
            hot=nsectors,
            near=0.3,
            cluster_sectors=cluster_sectors,
            mix=MIXES[draw.choice(("plane", "spread", "clear"))],
            calm=4,
            polled=False,
        )

    # what is done to the disk

    def _plan_actions(self, worker: OneThread, backend: ImageBackend, device: AttachedDevice) -> None:
        snapshots = Snapshots(device, backend, self.host)
        served = LiveChain(device, backend, self.host)
        kinds: list[tuple[str, Callable[[], None]]] = [
            ("snapshot", lambda: self._snapshot(snapshots)),
            ("snapshot", lambda: self._snapshot(snapshots)),
            ("stream", lambda: self._work(worker, backend, lambda: Streaming(served, self._some_base()))),
            ("commit", lambda: self._commit(worker, backend, served)),
        ]
        delay = 0
        for _ in range(self.random.randrange(2, 6)):
            delay += self.random.randrange(50 * US, 1500 * US)
            name, act = self.random.choice(kinds)
            self.kernel.at(delay, lambda name=name, act=act: self._call(worker, name, act))

    def _call(self, worker: OneThread, name: str, act: Callable[[], None]) -> None:
        def begin() -> None:
            self.done.append(name)
            act()

        self._actions.append(begin)
        lib.sim_raise(worker.control_fd)

    def _snapshot(self, snapshots: Snapshots) -> None:
        path = self.host.disk.files[0].path
        failure = snapshots.take(path, NoPace(), OverlayBitmaps())
        if failure:
            raise Violation(f"snapshot: {failure}")

    def _commit(self, worker: OneThread, backend: ImageBackend, served: LiveChain) -> None:
        self._has_committed = True
        self._work(worker, backend, lambda: Committing(served, self._some_base()))

    def _some_base(self) -> str | None:
        return self.random.choice([None, None, *(file.path for file in self.host.every_file)])

    def _work(self, worker: OneThread, backend: ImageBackend, begin: Callable[[], Work]) -> None:
        """As a job's thread does; what is refused has changed nothing."""
        try:
            work = begin()
        except ValueError:
            self.done[-1] += " refused"
            return
        work.prepare()
        outcome: Future[BaseException | None] = Future()

        def end(task: Task) -> None:
            outcome.set_result(task.take_error())

        backend.run(work.begin(Pace()), end)
        error = worker.wait(outcome)
        if error is not None:
            raise error
        work.finish()
        work.leave()

    @property
    def keeps_what_is_frozen(self) -> bool:
        """Whether nothing was written below the top."""
        return not self._has_committed
