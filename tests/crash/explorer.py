"""The explorer: visits the states that a death may leave behind and judges each by the laws.

A state is a crash point and the set of pending sectors that reached the disk. The same disk content found again at a
later point is opened once and judged twice, because only what is allowed has changed.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Protocol

from tests.crash.driver import Effect, Entry, Point, SimulatedFile, points
from tests.crash.history import SECTOR, History

Part = tuple[tuple[int, int], Effect]  # (operation, sector of it), what it does
EXHAUSTIVE = 8  # up to so many pending sectors every subset is visited


class Opener(Protocol):
    """Opens a state as the daemon would."""

    def __call__(self, image: SimulatedFile) -> bytes:
        """The whole guest disk after open, repair if dirty, and check; raises Violation if one of them objects."""


class Violation(AssertionError):
    """A law is broken; the message replays the state."""


@dataclass(slots=True)
class Run:
    """One workload that has been run: where it began, what happened, what is allowed."""

    name: str
    initial: SimulatedFile
    file: SimulatedFile
    journal: list[Entry]
    history: History


@dataclass(slots=True)
class Explorer:
    """Visits states of a run; counts them."""

    run: Run
    opener: Opener
    seed: int = 0
    samples: int = 6  # random subsets a point, where not all are visited
    at: int | None = None  # of a recovery: the moment of the kill before it
    states: int = 0
    opened: int = 0
    _contents: dict[tuple[int, int, frozenset[tuple[int, int]]], bytes] = field(default_factory=dict)
    _epoch: int = 0

    def explore(self, *, stride: int = 1, since: int = 0) -> int:
        """Judge the states of every *stride*-th crash point from position *since* on; the number of states visited."""
        draw = random.Random(self.seed)
        synced = -1
        for index, point in enumerate(points(self.run.journal, self.run.initial, self.run.file)):
            epoch = len(point.pending)
            if epoch < synced or synced < 0:  # a sync made some effects stable: what was opened before is another disk
                self._epoch += 1
                self._contents.clear()
            synced = epoch
            if index % stride == 0 and point.position >= since:
                self._visit(point, draw)
        return self.states

    def _visit(self, point: Point, draw: random.Random) -> None:
        parts = [
            ((number, index), part) for number, effect in point.pending for index, part in enumerate(effect.tear())
        ]
        self._judge(point, parts, power=False)
        for kept in subsets(parts, self.samples, draw):
            self._judge(point, kept, power=True)

    def _judge(self, point: Point, kept: list[Part], *, power: bool) -> None:
        self.states += 1
        memory = 0 if power else point.stores  # of the shared memory a power loss leaves nothing
        key = (self._epoch, memory, frozenset(name for name, _ in kept))
        content = self._contents.get(key)
        where = f"{self.run.name} point={point.position} power={power} kept={[name for name, _ in kept]}"
        if content is None:
            try:
                content = self.opener(point.keep(effect for _, effect in kept) if power else point.after_kill())
            except Violation as violation:
                raise Violation(f"{where}: {violation}") from violation
            self.opened += 1
            self._contents[key] = content
        self._compare(content, point.position if self.at is None else self.at, where, power=power)

    def _compare(self, content: bytes, position: int, where: str, *, power: bool) -> None:
        for sector in range(len(content) // SECTOR):
            found = content[sector * SECTOR : (sector + 1) * SECTOR]
            allowed = self.run.history.allowed(sector, position, power=power)
            if found not in allowed:
                names = sorted(name(value) for value in allowed)
                raise Violation(f"{where}: sector {sector} holds {name(found)}, allowed are {names}")


def name(content: bytes) -> str:
    """A sector's content in a word."""
    return "zeros" if content == bytes(SECTOR) else repr(content[:16])


def subsets(parts: list[Part], samples: int, draw: random.Random) -> Iterator[list[Part]]:
    """All subsets of few parts; of many: none, all, each alone, each missing, pairs missing and *samples* at random."""
    if len(parts) <= EXHAUSTIVE:
        for size in range(len(parts) + 1):
            yield from map(list, combinations(parts, size))
        return
    yield []
    yield parts
    chosen = draw.sample(range(len(parts)), min(len(parts), samples))
    for index in chosen:
        yield [parts[index]]
        yield parts[:index] + parts[index + 1 :]
    for _ in range(samples):
        yield [part for part in parts if draw.random() < 0.5]
