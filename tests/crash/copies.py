"""Copies of the file, made while its process lives and put back after a death: an older disk beside a newer log.

Nothing that was written after the copy may show, whatever the log says by then. If the log still knows the moment of
the copy, the disk is as after a kill at that moment; else the open is refused, and whoever insists has what a power
loss at that moment may leave: everything but the links that waited.
"""

import random
from dataclasses import dataclass, field

from tests.crash.driver import SimulatedFile
from tests.crash.variant import Disk
from tests.engine import MARK, waiting

KEPT = 8  # copies at a time
RENEWED = 1 / 4  # how often the newest gives way to one with the same mark


@dataclass(frozen=True, slots=True)
class Copy:
    """The file as it was at *position*."""

    position: int
    disk: Disk
    stable: SimulatedFile

    @property
    def mark(self) -> bytes:
        """What its header says of the log."""
        return self.disk.sector(self.stable, 0)[MARK]

    def put_back(self, log: bytes) -> tuple[SimulatedFile, bool]:
        """The file, and the link log as it is now; whether that log knows the moment of the copy.

        The file has no log if it does not: the next process was told to go on without.
        """
        file = self.disk.file(self.stable)
        file.memory.store(0, log)
        is_known = waiting(file) is not None
        if not is_known:
            file.memory.content.clear()
        return file, is_known


@dataclass(slots=True)
class Copies:
    """A few copies, of moments that differ in what the header says of the log."""

    seed: int
    _kept: list[Copy] = field(default_factory=list)
    _draw: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._draw = random.Random(self.seed)

    def offer(self, copy: Copy) -> None:
        """Keep *copy*, perhaps."""
        if self._kept and self._kept[-1].mark == copy.mark:
            if self._draw.random() < RENEWED:
                self._kept[-1] = copy
            return
        if len(self._kept) == KEPT:
            del self._kept[self._draw.randrange(KEPT)]
        self._kept.append(copy)

    def one(self) -> Copy | None:
        """Any of them."""
        return self._draw.choice(self._kept) if self._kept else None
