"""Workloads: what a guest asks of an image, run over the crash driver with every request and acknowledgement noted."""

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from qcow2.driver.buffer import MemoryBuffer
from qcow2.engine.bitmapdirectory import Change
from tests.crash.driver import CrashDriver
from tests.crash.explorer import Violation, name
from tests.crash.history import SECTOR, SIZE, Flush, History, pattern, size_sector


@dataclass(frozen=True, slots=True)
class Action:
    """One request of the guest: *kind* is write, zero, keep, discard, flush, read, grow, bitmaps or reopen.

    Sectors are of 512 bytes. Zeros give the space back, or keep it.

    The first sector of a grow is the length of the disk after it, that of bitmaps a number in BITMAP_CHANGES.
    """

    kind: str
    sector: int = 0
    nsectors: int = 0

    def __str__(self) -> str:
        return f"{self.kind}({self.sector},{self.nsectors})" if self.nsectors else self.kind


BITMAP_CHANGES: dict[int, Change] = {
    1: lambda plan: plan.add("extra", 1024, enabled=True),
    2: lambda plan: plan.merge_own("coarse", "fine"),
    3: lambda plan: plan.remove("extra"),
}
FREEZE, THAW = 4, 5  # the bitmap of single sectors; it is not copied
MOST_READ = 64  # sectors; what takes longer may show more
Step = Sequence[Action]  # actions under way at the same time


class Guest:
    """Sends actions to an image and keeps the history that judges it."""

    def __init__(self, driver: CrashDriver, image: Any, history: History) -> None:
        self.driver = driver
        self.image = image
        self.history = history
        self.requests = 0
        self.failures: list[OSError] = []
        self.frozen: Any = None  # a bitmap

    async def act(self, action: Action) -> None:
        """Perform one action; an OSError ends it without acknowledgement."""
        self.requests += 1
        try:
            await self._actions()[action.kind](action)
        except OSError as error:
            self.failures.append(error)

    def _actions(self) -> dict[str, Callable[[Action], Awaitable[None]]]:
        return {
            "write": self._write,
            "zero": partial(self._zero, unmap=True),
            "keep": partial(self._zero, unmap=False),
            "discard": self._discard,
            "flush": self._flush,
            "read": self._read,
            "grow": self._grow,
            "bitmaps": self._change_bitmaps,
            "reopen": self._nothing,
        }

    async def _nothing(self, action: Action) -> None:
        """Reopening is done by who runs the workload."""

    def _note(self, what: Any) -> int:
        self.driver.mark(what)
        return len(self.driver.journal) - 1

    async def _change(self, action: Action, contents: dict[int, bytes], change: Any, *, binding: bool = True) -> None:
        versions = self.history.begin(contents, self._note(("begin", self.requests, action)), binding=binding)
        await change
        if self.history.writethrough:
            await self.image.flush()  # a sync, if no link waits
        acked = self._note(("acked", action))
        for version in versions:
            version.acked = acked

    async def _write(self, action: Action) -> None:
        sectors = range(action.sector, action.sector + action.nsectors)
        contents = {sector: pattern(self.requests, sector) for sector in sectors}
        data = MemoryBuffer(memoryview(bytearray(b"".join(contents.values()))))
        await self._change(action, contents, self.image.write(action.sector * SECTOR, data))

    async def _zero(self, action: Action, *, unmap: bool) -> None:
        contents = {sector: bytes(SECTOR) for sector in range(action.sector, action.sector + action.nsectors)}
        change = self.image.write_zeroes(action.sector * SECTOR, action.nsectors * SECTOR, unmap=unmap)
        await self._change(action, contents, change)

    async def _discard(self, action: Action) -> None:
        contents = {sector: bytes(SECTOR) for sector in range(action.sector, action.sector + action.nsectors)}
        change = self.image.discard(action.sector * SECTOR, action.nsectors * SECTOR)
        await self._change(action, contents, change, binding=False)

    async def _flush(self, action: Action) -> None:
        flush = Flush(self._note(("begin", self.requests, action)))
        self.history.flushes.append(flush)
        await self.image.flush()
        flush.acked = self._note(("acked", action))

    async def _read(self, action: Action) -> None:
        """Judged at once: each sector shows what some moment of the read allows."""
        begun = self._note(("begin", self.requests, action))
        target = bytearray(action.nsectors * SECTOR)
        await self.image.read(action.sector * SECTOR, MemoryBuffer(memoryview(target)))
        ended = self._note(("acked", action))
        for index in range(action.nsectors):
            found = bytes(target[index * SECTOR : (index + 1) * SECTOR])
            self.require_shown(action.sector + index, found, begun, ended)

    def require_shown(self, sector: int, found: bytes, begun: int, ended: int) -> None:
        """Raises: Violation if a read between these positions must not have *found* that."""
        shown = self.history.shown(sector, begun, ended)
        if found not in shown:
            raise Violation(f"a read finds {name(found)} in sector {sector}, allowed are {sorted(map(name, shown))}")

    async def _change_bitmaps(self, action: Action) -> None:
        """Alone in its step; those that there are at the start are there all the time."""
        if action.sector == FREEZE:
            self.frozen = await self.image.freeze_bitmap("fine")
        elif action.sector == THAW:
            await self.image.thaw_bitmap(self.frozen, is_copied=False)
        else:
            await self.image.change_bitmaps(BITMAP_CHANGES[action.sector])

    async def _grow(self, action: Action) -> None:
        """The size is judged as one more sector, stable as soon as growth is acknowledged."""
        nbytes = action.sector * SECTOR
        (version,) = self.history.begin({SIZE: size_sector(nbytes)}, self._note(("begin", self.requests, action)))
        version.is_stable = True
        await self.image.grow(nbytes)
        version.acked = self._note(("acked", action))


def random_steps(
    seed: int, nsectors: int, cluster_sectors: int, *, steps: int = 12, depth: int = 3
) -> list[list[Action]]:
    """A seeded sequence of steps of up to *depth* concurrent actions on a disk of *nsectors*."""
    draw = random.Random(seed)
    return [
        [random_action(draw, nsectors, cluster_sectors) for _ in range(draw.randint(1, depth))] for _ in range(steps)
    ]


def random_action(draw: random.Random, nsectors: int, cluster_sectors: int) -> Action:
    """One action; half of them whole clusters, the others anywhere."""
    kind = draw.choices(["write", "zero", "discard", "flush"], [6, 1, 2, 2])[0]
    if kind == "flush":
        return Action("flush")
    if draw.random() < 0.5:
        count = draw.randint(1, 3) * cluster_sectors
        first = draw.randrange(0, nsectors, cluster_sectors)
    else:
        count = draw.randint(1, max(2, cluster_sectors))
        first = draw.randrange(nsectors)
    return Action(kind, first, min(count, nsectors - first))
