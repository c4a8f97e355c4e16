"""A history: lives of one daemon on one host, each ended by a kill, a power loss, or its own will."""

import errno
import logging
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from qcow2.engine.image import Image
from qcow2.format.layout import HEADER_INCOMPATIBLE_OFFSET, Incompatible
from ring.files import look_at
from ring.native import lib
from tests.crash.driver import Completed
from tests.crash.explorer import Run
from tests.crash.explorer import Violation as CrashViolation
from tests.crash.history import SIZE, History, size_sector
from tests.crash.images import open_image
from tests.crash.opening import Seen, look, open_state
from tests.crash.sequence import Sort
from tests.crash.walk import Judge
from tests.sim.file import KernelFile
from tests.sim.guest import MIXES, WIDE, Guest, Setup
from tests.sim.image import files_of, open_again
from tests.sim.liveness import Longest
from tests.sim.served import Block, Served, SimulatedWorker
from tests.sim.trouble import Dead, Lost, Trouble, Violation
from tests.sim.units import Contents, Units
from vhost.disk import ImageBackend
from virtio.config import MAX_RANGE_SECTORS, Properties

logging.getLogger("vhost").setLevel(logging.CRITICAL)


class HeldSimulation:
    """In place of `vhost.held.HeldImage`."""

    def __init__(self, image: Image, files: list[KernelFile], size: int, *, is_direct: bool) -> None:
        self.disk = SimpleNamespace(image=image, files=files, chain=SimpleNamespace(nodes=[image]))
        self.beside = None
        self.files = files
        self.direct_fds = {file: file.direct_fd for file in files} if is_direct else {}
        self.traits = {file: look_at(file.fd, self.direct_fds.get(file, -1)) for file in files}
        self.properties = Properties(size=size)


@dataclass
class Tally:
    """What was seen."""

    histories: int = 0
    lives: int = 0
    kills: int = 0
    power_losses: int = 0
    requests: int = 0
    refused: int = 0
    calls: int = 0
    simulated_ns: int = 0


class World(Served):
    """One history, of *seed*."""

    def __init__(
        self,
        seed: int,
        sort: Sort,
        *,
        writethrough: bool,
        trouble: Trouble,
        lives: int,
        is_long: bool,
        is_direct: bool = False,
    ) -> None:
        """*is_direct*: data goes by O_DIRECT, so it is never on its way within one call."""
        self.is_direct = is_direct
        self.is_long = is_long
        self._is_told_to_stop = False
        self.shared: dict[int, bytes] = {}  # host clusters that a snapshot has, and what they hold
        super().__init__(seed, trouble)
        self.sort = sort
        self.writethrough = writethrough
        self.lives = lives
        files = files_of(sort)
        begun = files.begun
        self.file = self._file(begun.image)
        self.data = None if files.data is None else self._file(files.data)
        self.written = [file for file in (self.file, self.data) if file is not None]
        self.backing = None if begun.backing is None else self._file(begun.backing)
        if self.backing is not None:
            self.backing.writable = False
        self._add_memory(self.file)
        self.initial = self._copies()  # stable when the journal began
        beyond = {**begun.beyond, SIZE: size_sector(sort.nsectors * 512)}
        self.history = History(begun.contents, writethrough=writethrough, beyond=beyond)
        self.photo: tuple[bytes, bytes] | None = None  # of its memory, at a death
        self.requests = 0
        self.tally = Tally(histories=1)
        self.longest = Longest()
        self.first = 0  # of the journal, for whoever visits the states of the last life

    def _copies(self) -> Contents:
        return {file: file.copy() for file in self.written}

    @property
    def digest(self) -> str:
        return self.kernel.digest.hexdigest()

    def run(self) -> None:
        """All lives. Raises: Violation."""
        try:
            for life in range(self.lives):
                self._live(life, is_last=life == self.lives - 1)
        finally:
            self._let_guest_go()
            self.tally.simulated_ns = self.kernel.now

    def _live(self, life: int, *, is_last: bool) -> None:
        self.tally.lives += 1
        self.first = len(self.kernel.journal)
        self.kernel.reset()
        self.photo = None
        opens_at = self.random.randrange(1, 60) if not is_last and self.random.random() < 0.15 else None
        try:
            image = self._open(life, dies_at=opens_at)
            self._serve(image, is_last=is_last)
        except Dead:
            self._after_death()

    # opening and closing

    def _open(self, life: int, *, dies_at: int | None) -> Image:
        image = self._through(
            open_image(self.file, self.backing, data=self.data, writethrough=self.writethrough, life=life),
            dies_at=dies_at,
        )
        assert isinstance(image, Image)
        self._judge(self._through(look(image)), power=False)
        self._judge_snapshot(image)
        return image

    def _judge_snapshot(self, image: Image) -> None:
        """What an internal snapshot shares with the disk at first stays as it is."""
        nbytes = 1 << self.sort.cluster_bits
        if self.sort.snapshot and not self.shared:
            runs = [self._through(image.resolve(cluster * nbytes, nbytes)) for cluster in (4, 5)]
            self.shared = {run.host_offset: self.file.read(run.host_offset, nbytes) for run in runs}
        for host_offset, content in self.shared.items():
            if self.file.read(host_offset, nbytes) != content:
                raise Violation(f"the snapshot's cluster at {host_offset:#x} has changed")

    def _judge(self, seen: Seen, *, power: bool) -> None:
        position = len(self.kernel.journal)
        try:
            Judge(self.history, self.kernel.journal).judge(seen, position, power=power)
        except CrashViolation as error:
            raise Violation(str(error)) from error

    # serving

    def _serve(self, image: Image, *, is_last: bool) -> None:
        block = Block(
            size=self.sort.nsectors * 512,
            max_range_sectors=MAX_RANGE_SECTORS,
        )
        files = [*self.written, *([] if self.backing is None else [self.backing])]
        held: Any = HeldSimulation(image, files, self.sort.nsectors * 512, is_direct=self.is_direct)
        try:
            with self._serving(SimulatedWorker, block, held) as (worker, backend):
                self._meet(worker, is_last=is_last)
                assert self.guest is not None
                while not self.guest.is_done and not self._is_told_to_stop:
                    worker.turn()
                self._stop(worker, backend, self.guest)
        except OSError as error:
            if not self.kernel.is_dead or error.errno not in (errno.ESHUTDOWN, errno.EIO):
                raise
        except Violation as error:
            self.kernel.error = self.kernel.error or error
        finally:
            self.tally.calls += self.kernel.state.calls
        if self.kernel.error is not None:
            raise self.kernel.error
        if self.kernel.is_dead:
            raise Dead
        failed = self.kernel.failures > 0
        if self.guest is not None and self.guest.is_done:
            self._retire()
        dies_at = self.random.randrange(1, 30) if not is_last and self.random.random() < 0.3 else None
        try:
            self._through(image.close(), dies_at=dies_at)
        except Violation:
            if not failed:
                raise
            self._require_warning(image)
            raise Dead from None  # it says so; what it leaves is as after a death
        if block.takes_no_writes:
            raise Violation("writes have ended, and the image closes as if nothing had happened")
        self._judge(self._through(look(self._through(open_again(self.file, self.backing, self.data)))), power=False)

    def _require_warning(self, image: Image) -> None:
        """A sync has failed: whoever opens the image next is told."""
        failed_at = self.kernel.sync_failed_at
        told = image.header.record.version >= 3 and failed_at is not None and self.kernel.failed_at < failed_at
        word = int.from_bytes(self.file.read(HEADER_INCOMPATIBLE_OFFSET, 8), "big")
        if told and not word & Incompatible.DIRTY:
            raise Violation("a sync has failed, and the image does not say so")

    def _meet(self, worker: SimulatedWorker, *, is_last: bool) -> None:
        """The guest is there: a new one, or one that has waited for the daemon."""
        if self.guest is None:
            setup = self._setup()
            self.guest = Guest(self.kernel, setup, self.history, self.requests)
        if self.guest.started:
            self.guest.left += self.random.randrange(4, 12)
        self.guest.is_closing = False
        self.guest.control_fd = worker.control_fd
        self.guest.connect(worker)
        self._is_told_to_stop = False
        if not is_last and self.random.random() < 0.2:
            self.kernel.at(self.random.randrange(10_000, 3_000_000), lambda: self._tell_to_stop(worker.control_fd))
        elif not is_last:
            guest = self.guest
            self.kernel.die_at(
                self.kernel.state.calls + self.random.randrange(1, self.random.choice((60, 300, 1000, 2500, 2500))),
                lambda: self._photograph(guest),
            )

    def _tell_to_stop(self, control_fd: int) -> None:
        self._is_told_to_stop = True
        lib.sim_raise(control_fd)

    def _stop(self, worker: SimulatedWorker, backend: ImageBackend, guest: Guest) -> None:
        """As the session does."""
        if not guest.liveness.is_calm:
            guest.liveness.calm(())
        began = self.kernel.now
        self._drain(worker, guest)
        worker.quiesce()
        backend.detach()
        worker.finish()
        guest.liveness.stopped(began)

    def _photograph(self, guest: Guest) -> None:
        self.photo = guest.photograph()

    def _setup(self) -> Setup:
        draw = self.random
        num_queues = draw.choice((1, 1, 2, 4))
        scans = self.sort.tables > 1
        mix = "scan" if scans else draw.choice(("plane", "plane", "clear", "spread"))
        return Setup(
            num_queues=num_queues,
            size=draw.choice((32, 64, 128)),
            packed=draw.random() < 0.5,
            event_idx=draw.random() < 0.5,
            indirect=draw.random() < 0.6,
            depth=draw.choice((1, 2, 6, 6)),
            requests=draw.randrange(150, 300) if self.is_long else draw.randrange(8, 40),
            nsectors=self.sort.nsectors,
            hot=self.sort.nsectors if mix in WIDE else min(self.sort.nsectors, 24 * self.sort.cluster_sectors),
            near=0.3 if mix in WIDE else 0,
            cluster_sectors=self.sort.cluster_sectors,
            mix=MIXES[mix],
            calm=num_queues * (draw.choice((4, 4, 8, 120)) if num_queues > 1 else 4),
            polled=draw.random() < 0.15,
            crooked=draw.choice((0, 0, 0.2, 1)),
        )

    def _retire(self) -> None:
        """The guest has been served and goes."""
        assert self.guest is not None
        self.requests = self.guest.requests
        self.tally.requests += self.guest.answered
        self.tally.refused += self.guest.refused
        self.longest.add(self.guest.liveness.longest)
        self._let_guest_go()

    # death

    def _after_death(self) -> None:
        units = self._units()
        if self.random.random() < 0.35:
            self._lose_power(units)
        else:
            self._kill(units)

    def _units(self) -> Units:
        units = Units(self.initial)
        for entry in self.kernel.journal:
            units.take(entry)
        return units

    def _kill(self, units: Units) -> None:
        """The page cache stays; of what was in flight any part has come to it."""
        self.tally.kills += 1
        for number in sorted(units.in_flight):
            is_kept = self.random.random() < 0.5
            entry = Completed(number, is_late=True) if is_kept else Lost(number)
            self.kernel.journal.append(entry)
            units.take(entry)
        self._become(units.after(units.pending.values()))
        self.kernel.pending.clear()
        self.kernel.pending.update({number: effect.file for number, effect in units.pending.items()})
        self.kernel.note("killed", [*units.pending])
        if self.guest is not None and self.photo is not None:
            self.guest.restore(self.photo)
            self.photo = None

    def _lose_power(self, units: Units) -> None:
        """What was stable stays, of the rest any part; the guest is gone."""
        self.tally.power_losses += 1
        parts = [part for effect in units.pending.values() for part in effect.tear()]
        share = self.random.choice((0.0, 0.2, 0.5, 0.8, 1.0))
        kept = [part for part in parts if self.random.random() < share]
        self._become(units.after(kept))
        self.kernel.note("power", len(parts), len(kept))
        memory = self.kernel.memories[0]
        memory.store(0, bytes(len(memory.content)))
        if self.guest is not None:
            self._retire()
        seen = self._seen_after_power()
        self.kernel.journal.clear()
        self.kernel.pending.clear()
        self.initial = self._copies()
        self.history = History(b"", writethrough=self.writethrough, beyond={**seen, SIZE: seen[SIZE]})

    def _seen_after_power(self) -> Seen:
        """Judge what is left, on a copy."""
        try:
            opened = open_state(self.file.copy(), self.backing, None if self.data is None else self.data.copy())
        except CrashViolation as error:
            raise Violation(str(error)) from error
        self._judge(opened.seen, power=True)
        return opened.seen

    def _become(self, files: Contents) -> None:
        for file, content in files.items():
            file.sectors, file.size = content.sectors, content.size

    @property
    def is_walkable(self) -> bool:
        """Whether the explorer, which knows one file, can visit the deaths."""
        return self.data is None

    def as_run(self) -> Run:
        """The last life, for the explorer."""
        journal: Any = self.kernel.journal
        return Run(f"sim/{self.sort.name}/{self.seed}", self.initial[self.file], self.file, journal, self.history)
