"""A life of a disk that somebody works on while a guest uses it: its chain changes, it is copied, bitmaps record."""

import itertools
from collections.abc import Iterable
from typing import Any

from qcow2.driver.buffer import MemoryBuffer
from qcow2.engine.create import Options, create
from qcow2.engine.image import Image
from qcow2.engine.opened import OpenOptions
from qcow2.node.chain import Chain
from qcow2.node.node import Node
from qcow2.plane.linklog import LIMIT, LinkLog
from tests.crash.driver import SimulatedFile
from tests.crash.history import SECTOR, SIZE, History, size_sector
from tests.crash.images import LOG_CAPACITY, LOG_NUMBERS, content, read_all
from tests.engine import ORIGIN
from tests.sim.file import KernelFile
from tests.sim.guest import MIXES, Guest, Setup
from tests.sim.liveaction import Operator
from tests.sim.livecopy import install
from tests.sim.livehost import AttachedDevice, Directory, LiveHost, OneThread
from tests.sim.liveledger import Ledger
from tests.sim.liveness import Liveness, Waiting
from tests.sim.served import Block, Served
from tests.sim.trouble import Trouble
from vhost.disk import ImageBackend
from virtio.config import MAX_RANGE_SECTORS

TAGS = 4096  # of link logs of one image, at most
CLUSTERS = 40
LIVE_NBYTES = 4096  # behind the records of a log, for what bitmaps know
WAITS = ((2, 20, 200), (2, 20, 200), (20, 200, 1000))  # of a guest: so that it is at work while jobs are


class Unhurried(Liveness):
    """Requests may wait: for a snapshot, for a job's last step."""

    def be_kind(self) -> None:
        """Nobody is asked."""
        self.is_kind = True

    def answered(self, one: Waiting, others: Iterable[Waiting]) -> None:
        """However late."""


class LiveWorld(Served):
    """One disk, its guest and what is done to it, all of it drawn from *seed*."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, Trouble(punches=seed % 3 != 0))
        draw = self.random
        self.writethrough = draw.random() < 0.2
        self.cluster_bits = draw.choice((10, 10, 12))
        self.is_lazy = draw.random() < 0.5
        self._tags = itertools.count(1)
        self.ledger = Ledger()
        chain = self._make_chain()
        names = self._file_at("names")
        self.host = LiveHost(chain, Directory(self.kernel, names, "f1"), self._file_at, self._open_new, self._through)
        install(self.host, self.kernel)
        top: Any = chain.nodes[0]
        contents = self._through(read_all(top))
        self.history = History(contents, writethrough=self.writethrough, beyond={SIZE: size_sector(len(contents))})
        self.kernel.journal.clear()
        self.kernel.pending.clear()
        self.initial = {file: file.copy() for file in [*chain.files, names]}
        self.memories = {file.memory: bytes(file.memory.content) for file in chain.files}

    # files

    def _file_at(self, path: str) -> KernelFile:
        file = self._file(SimulatedFile(path, {}, 0))
        self._add_memory(file, LIVE_NBYTES)
        if hasattr(self, "initial"):  # it comes to be while the chain is served
            self.initial[file] = file.copy()
            self.memories[file.memory] = bytes(file.memory.content)
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
        block = Block(size=self.host.disk.size, max_range_sectors=MAX_RANGE_SECTORS)
        try:
            with self._serving(OneThread, block, self.host) as (worker, backend):
                self._serve(worker, backend, AttachedDevice(backend, block, worker))
        except OSError:
            if self.kernel.error is None:
                raise
        finally:
            self._let_guest_go()
        if self.kernel.error is not None:
            raise self.kernel.error
        self._through(self.host.disk.image.close())

    def _serve(self, worker: OneThread, backend: ImageBackend, device: AttachedDevice) -> None:
        self.guest = guest = Guest(self.kernel, self._guest_setup(), self.history, 0)
        guest.liveness = Unhurried(self.kernel)
        guest.waits = self.random.choice(WAITS)
        guest.control_fd = worker.control_fd
        guest.connect(worker)
        operator = Operator(self.kernel, self.ledger, worker, backend, device, self.host)
        operator.plan()
        while not guest.is_done or not operator.is_done:
            operator.step()
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
            mix=MIXES[draw.choice(("plane", "spread", "clear", "settle"))],
            calm=4,
            polled=False,
            crooked=draw.choice((0, 0.2)),
        )
