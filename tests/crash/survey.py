"""The survey: visits drawn crash points of a recorded run, each with the states that are most likely to betray a bug.

A trace of a real guest is too long for every subset, so the points are drawn from a seed, half of them right after an
answer, and at each: a *kill* keeps what was complete and perhaps what was in flight; a *power* loss keeps what was
stable and of the rest all, nothing, only data, only metadata, all but one, one, or any half.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from qcow2.driver.buffer import MemoryBuffer
from qcow2.engine.image import Image
from qcow2.plane.l2cache import Kind
from tests.crash.driver import Completed, Effect, Mark, Point, points
from tests.crash.explorer import Violation, name
from tests.crash.history import SECTOR
from tests.crash.judge import open_state
from tests.crash.recorded import Recorded

METADATA_BYTES = 512  # what is shorter is an entry, not a guest's data
Parts = Sequence[Effect]


@dataclass
class Survey:
    """Visits states of *run*; counts them."""

    run: Recorded
    cluster_sectors: int
    seed: int = 0
    samples: int = 2
    states: int = 0
    points: int = 0
    _ranges: list[range] = field(default_factory=list)  # sectors of the clusters that a request touched

    def __post_init__(self) -> None:
        size = self.cluster_sectors
        clusters = sorted({sector // size for sector in self.run.touched})
        self._ranges = [range(i * size, min((i + 1) * size, self.run.nsectors)) for i in clusters]
        self._draw = random.Random(self.seed)

    def visit(self, count: int) -> int:
        """Judge the states of *count* points, or of all if there are no more; the number of states visited.

        Raises: Violation, which names the point and the state.
        """
        chosen = self._choose(count)
        completed: set[int] = set()
        looked_at = 0
        for point in points(self.run.journal, self.run.initial, self.run.file):
            for entry in self.run.journal[looked_at : point.position]:
                if isinstance(entry, Completed):
                    completed.add(entry.number)
            looked_at = point.position
            if point.position in chosen:
                self._visit(point, completed)
        return self.states

    def _choose(self, count: int) -> set[int]:
        """Positions in the journal: those right after an answer, as many others, and the last one."""
        journal = self.run.journal
        answered = [i + 1 for i, entry in enumerate(journal) if isinstance(entry, Mark) and entry.what[0] == "ANSWER"]
        others = sorted(set(range(1, len(journal) + 1)) - set(answered))
        half = max(count // 2, count - len(others))
        chosen = set(self._draw.sample(answered, min(half, len(answered))))
        chosen |= set(self._draw.sample(others, min(count - len(chosen), len(others))))
        return chosen | {len(journal)}

    def _visit(self, point: Point, completed: set[int]) -> None:
        self.points += 1
        for power, states in ((False, self._kills(point, completed)), (True, self._power_losses(point))):
            allowed = self._allowed(point.position, power=power)
            seen = set()
            for label, kept in states:
                identity = frozenset((effect.host_offset, id(effect.data)) for effect in kept)
                if identity not in seen:
                    seen.add(identity)
                    self._judge(point, kept, allowed, f"point {point.position}, seed {self.seed}, {label}", power)

    def _kills(self, point: Point, completed: set[int]) -> Iterator[tuple[str, Parts]]:
        """The page cache has what was complete, and of the rest what had come so far."""
        in_flight = [number for number, _ in point.pending if number not in completed]
        yield "kill, all that was issued", [effect for _, effect in point.pending]
        for sample in range(self.samples if len(in_flight) > 1 else 1):
            dropped = set(in_flight) if sample == 0 else {n for n in in_flight if self._draw.random() < 0.5}
            kept = [effect for number, effect in point.pending if number not in dropped]
            yield f"kill, without {sorted(dropped)}", kept

    def _power_losses(self, point: Point) -> Iterator[tuple[str, Parts]]:
        whole = [effect for _, effect in point.pending]
        yield "power, nothing pending", []
        yield "power, all", whole
        yield "power, metadata only", [effect for effect in whole if is_metadata(effect)]
        yield "power, data only", [effect for effect in whole if not is_metadata(effect)]
        for _ in range(self.samples):
            if whole:
                index = self._draw.randrange(len(whole))
                yield f"power, all but operation {point.pending[index][0]}", whole[:index] + whole[index + 1 :]
                yield f"power, only operation {point.pending[index][0]}", [whole[index]]
            yield "power, half of the operations", [effect for effect in whole if self._draw.random() < 0.5]
            sectors = [part for effect in whole for part in effect.tear()]
            yield "power, half of the sectors", [part for part in sectors if self._draw.random() < 0.5]

    def _allowed(self, position: int, *, power: bool) -> dict[int, set[bytes]]:
        return {sector: self.run.history.allowed(sector, position, power=power) for sector in self.run.touched}

    def _judge(self, point: Point, kept: Parts, allowed: dict[int, set[bytes]], where: str, power: bool) -> None:
        self.states += 1
        file = point.keep(kept)
        if not power:
            file.memory.store(0, bytes(point.memory.content))
        try:
            self._compare(open_state(file, self.run.backing, self._look), allowed)
        except Violation as violation:
            raise Violation(f"{where}: {violation}") from violation

    async def _look(self, image: Image) -> bytes:
        """The touched clusters; the others must be as they were."""
        seen = []
        end = 0
        for cluster in self._ranges:
            await self._require_untouched(image, range(end, cluster.start))
            seen.append(await read(image, cluster))
            end = cluster.stop
        await self._require_untouched(image, range(end, self.run.nsectors))
        return b"".join(seen)

    async def _require_untouched(self, image: Image, sectors: range) -> None:
        """What is mapped nowhere shows what is under it, as it did before; anything else is read."""
        start, end = sectors.start * SECTOR, sectors.stop * SECTOR
        while start < end:
            run = await image.resolve(start, end - start)
            if run.kind != Kind.UNALLOCATED:
                found = await read(image, range(start // SECTOR, (start + run.nbytes) // SECTOR))
                if found != self.run.history.initial[start : start + run.nbytes]:
                    raise Violation(f"{run.nbytes} bytes at {start:#x}, which no request was for, have changed")
            start += run.nbytes

    def _compare(self, content: bytes, allowed: dict[int, set[bytes]]) -> None:
        at = 0
        for cluster in self._ranges:
            for sector in cluster:
                found = content[at : at + SECTOR]
                at += SECTOR
                expected = allowed.get(sector)
                if found not in (expected or (self.run.history.before(sector),)):
                    names = sorted(map(name, expected or [self.run.history.before(sector)]))
                    raise Violation(f"sector {sector} holds {name(found)}, allowed are {names}")


def is_metadata(effect: Effect) -> bool:
    return effect.kind != "write" or len(effect.data) <= METADATA_BYTES


async def read(image: Image, sectors: range) -> bytes:
    """What the guest finds there."""
    target = bytearray(len(sectors) * SECTOR)
    await image.read(sectors.start * SECTOR, MemoryBuffer(memoryview(target)))
    return bytes(target)
