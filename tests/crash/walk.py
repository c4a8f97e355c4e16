"""The walk: visits every moment of a run at which it may die, and every state that a death there may leave.

At each entry of the journal, *kill* keeps what was complete and any subset of what was in flight; *power* keeps any
subset of what was pending: of its sectors while they are few, of its operations while these are few, else none, all,
each alone, each missing, pairs, and samples drawn from the seed. Where sectors are too many for every subset, writes
are torn at samples. After a kill one copy of the file from an earlier moment is put back beside the log (`copies`).
Equal disks are opened once, in all runs from one image; each is judged wherever it is found.
"""

import random
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

from qcow2.judge.repair import RepairMode, repair
from tests.crash.copies import Copies, Copy
from tests.crash.driver import (
    Completed,
    CrashDriver,
    Effect,
    Issued,
    Mark,
    SimulatedFile,
    SimulatedMemory,
    Stored,
    Synced,
)
from tests.crash.explorer import Run, Violation, name
from tests.crash.history import ZEROS, History
from tests.crash.images import open_image, replay_log
from tests.crash.opening import ERRORS, Opened, Seen, open_state
from tests.crash.outside import judge_outside
from tests.crash.variant import Disk, Unit, doubled, merge, reached, whole

EXHAUSTIVE = 8  # operations, or sectors, of which every subset is visited
PAIRS = 28  # at most, of more operations than that
SAMPLES = 4  # torn or random subsets a moment
OUTSIDE = 160  # one in so many states is judged by QEMU, too
RECOVERED = 20  # one in so many states that open changes, or that leak, has each recovery visited as a run of its own
RECOVERIES = {"open": None, "leaks": RepairMode.LEAKS, "all": RepairMode.ALL}  # as the daemon opens it; `check -r`
KEPT_STATES = 100_000  # opened states that are remembered

Allowed = dict[int, set[bytes]]


@dataclass(slots=True)
class Count:
    """What was visited."""

    workloads: int = 0
    moments: int = 0
    states: int = 0
    opened: int = 0
    recoveries: int = 0
    copies: int = 0
    outside: int = 0

    def add(self, other: "Count") -> None:
        """Sum up."""
        for field_name in self.__slots__:
            setattr(self, field_name, getattr(self, field_name) + getattr(other, field_name))


@dataclass
class Scene:
    """What the runs from one image have in common: the states that were opened, and QEMU's part."""

    backing: SimulatedFile | None
    directory: Path | None = None  # for QEMU to judge in; None: it does not
    count: Count = field(default_factory=Count)
    opened: dict[int, Opened | None] = field(default_factory=dict)  # by identity; what they hold, without the file
    _seen: dict[frozenset[tuple[int, bytes]], Seen] = field(default_factory=dict)
    _recoverable: set[tuple[int, int]] = field(default_factory=set)
    _until_outside: int = 1

    def open(self, identity: int, make: Callable[[], SimulatedFile]) -> Opened:
        """What the disk *identity*, which *make* makes, shows."""
        known = self.opened.get(identity)
        if known is not None:
            return known
        if len(self.opened) >= KEPT_STATES:
            self.opened.clear()
            self._seen.clear()
            self._recoverable.clear()
        found = open_state(make(), self.backing)
        seen = self._seen.setdefault(frozenset(found.seen.items()), found.seen)
        kept = Opened(seen, found.file, found.leaks, found.was_recovered)
        self.opened[identity] = Opened(seen, NO_FILE, found.leaks, found.was_recovered)
        self.count.opened += 1
        return kept

    def is_to_recover(self, state: tuple[int, int]) -> bool:
        """Whether *state*, the disk and what of it is stable, is the one in RECOVERED that are new."""
        is_new = state not in self._recoverable
        self._recoverable.add(state)
        return is_new and (len(self._recoverable) - 1) % RECOVERED == 0

    def judge_outside(self, states: int, make: Callable[[], SimulatedFile]) -> None:
        """Let QEMU judge the file that *make* makes, the first time, and once every OUTSIDE states."""
        self._until_outside -= states
        if self._until_outside > 0 or self.directory is None:
            return
        self._until_outside += OUTSIDE * (1 - self._until_outside // OUTSIDE)
        found = open_state(make(), self.backing)
        judge_outside(self.directory, found.file, self.backing, found.seen)
        self.count.outside += 1


NO_FILE = SimulatedFile("forgotten", {}, 0)


class Judge:
    """What a history allows at each moment, worked out once a request begins or ends."""

    def __init__(self, history: History, entries: Sequence[object]) -> None:
        self.history = history
        self._epochs = [0]
        for entry in entries:
            self._epochs.append(self._epochs[-1] + isinstance(entry, Mark))
        self._allowed: dict[tuple[int, bool], Allowed] = {}
        self._verdicts: set[tuple[int, int, bool]] = set()
        self._untouched: set[int] = set()

    def judge(self, seen: Seen, position: int, *, power: bool) -> None:
        """Raises: Violation if *seen* is not allowed after a death at *position*."""
        epoch = self._epochs[position]
        key = (id(seen), epoch, power)
        if key in self._verdicts:
            return
        if id(seen) not in self._untouched:
            self._require_untouched(seen)
            self._untouched.add(id(seen))
        for sector, allowed in self._at(epoch, position, power).items():
            found = seen.get(sector, ZEROS)
            if found not in allowed:
                raise Violation(f"sector {sector} holds {name(found)}, allowed are {sorted(map(name, allowed))}")
        self._verdicts.add(key)

    def _at(self, epoch: int, position: int, power: bool) -> Allowed:
        known = self._allowed.get((epoch, power))
        if known is None:
            known = self._allowed[epoch, power] = self.history.allowed_everywhere(position, power=power)
        return known

    def _require_untouched(self, seen: Seen) -> None:
        """What no request was for is as it was."""
        touched = self.history.versions
        for sector, found in seen.items():
            if sector not in touched and found != self.history.before(sector):
                raise Violation(f"sector {sector}, which no request was for, holds {name(found)}")
        for sector in self.history.nonzero():
            if sector not in touched and sector not in seen:
                raise Violation(f"sector {sector}, which no request was for, holds zeros")


class Walk:
    """Visits the states of one run."""

    def __init__(
        self, run: Run, scene: Scene, seed: int, *, judge: Judge | None = None, at: tuple[int, bool] | None = None
    ) -> None:
        self.run = run
        self.scene = scene
        self._judge = judge or Judge(run.history, run.journal)
        self._at = at  # of a repair: the moment of the death before it, and whether that was a power loss
        self._seed = seed
        self._draw = random.Random(seed)
        self._stable = run.initial.copy()
        self._base = whole(self._stable)
        self._memory = SimulatedMemory(run.initial.memory.content)
        self._nunits = 0
        self._pending: dict[int, Unit] = {}  # in the order they took effect
        self._parts: dict[int, list[Unit]] = {}
        self._in_flight: set[int] = set()
        self._losses: dict[int, Disk] | None = {self._base.identity(): self._base}  # None: too many
        self._copies = Copies(seed)

    def visit(self, first: int = 0, only: Container[int] | None = None) -> None:
        """Judge the states at every position of the journal past *first*, or those of *only*.

        Raises: Violation; its message is what `replay` takes.
        """
        for position, entry in enumerate(self.run.journal, 1):
            is_power = self._take(entry)
            if position > first and (only is None or position in only):
                self.scene.count.moments += 1
                self._draw = random.Random(self._seed * 1_000_003 + position)
                if is_power:
                    for disk in self._after_power(entry):
                        self._require(disk, position, power=True)
                for disk in self._after_kill():
                    self._require(disk, position, power=False)
                self._put_back(position)
            if self._at is None:
                self._copies.offer(Copy(position, next(self._after_kill()), self._stable))

    def _put_back(self, position: int) -> None:
        copy = self._copies.one()
        if copy is not None and any(self._memory.content):
            self._require_copy(copy, position)

    def replay_copy(self, copied: int, kept: Sequence[str], position: int) -> None:
        """Judge a copy made at *copied* and put back after a death at *position*. Raises: Violation."""
        for entry in self.run.journal[:copied]:
            self._take(entry)
        copy = Copy(copied, reached(self._base, self._stable, self._named(kept)), self._stable)
        for entry in self.run.journal[copied:position]:
            self._take(entry)
        self._require_copy(copy, position)

    def replay(self, position: int, kept: Sequence[str], *, power: bool) -> None:
        """Judge one state. Raises: Violation."""
        for entry in self.run.journal[:position]:
            self._take(entry)
        self._require(reached(self._base, self._stable, self._named(kept)), position, power=power)

    def replay_recovery(self, position: int, kept: Sequence[str], *, power: bool, how: str) -> "Walk":
        """The walk over that recovery of one state."""
        for entry in self.run.journal[:position]:
            self._take(entry)
        return self._recover(position, kept, power=power, how=how)[0]

    def _named(self, kept: Sequence[str]) -> list[Unit]:
        """The units of those names, in the order they took effect."""
        units = {unit.name: unit for number in self._pending for unit in (self._pending[number], *self._parts[number])}
        return [unit for name, unit in units.items() if name in kept]

    def _take(self, entry: object) -> bool:
        """Go past *entry*; whether a power loss may leave something new, or is judged anew."""
        match entry:
            case Issued(number, effect) if effect.file is self.run.file:
                unit = self._pending[number] = Unit(str(number), effect)
                torn = effect.tear()
                self._parts[number] = (
                    [unit] if len(torn) == 1 else [Unit(f"{number}.{i}", part) for i, part in enumerate(torn)]
                )
                self._in_flight.add(number)
                self._add(number)
            case Completed(number, is_late) if number in self._pending:
                self._in_flight.discard(number)
                if is_late and next(reversed(self._pending)) != number:
                    self._pending[number] = self._pending.pop(number)
                    self._enumerate()
                return False
            case Synced(file, numbers) if file is self.run.file:
                for number in [number for number in self._pending if number in numbers]:
                    self._base.take(self._stable, self._pending.pop(number).effect)
                    del self._parts[number]
                self._stable = self._base.file(self._stable)
                self._base = Disk({}, self._base.size, self._base.digest)
                self._enumerate()
            case Stored(memory, offset, data) if memory is self.run.file.memory:
                self._memory.store(offset, data)
                return False
            case Mark():
                pass
            case _:
                return False
        return True

    def _add(self, number: int) -> None:
        """One more operation is pending."""
        if self._losses is None or self._is_many() or len(self._units()) - len(self._parts[number]) != self._nunits:
            self._enumerate()
            return
        for unit in self._parts[number] if self._is_torn() else [self._pending[number]]:
            self._losses = doubled(self._losses, self._stable, unit)
        self._nunits = len(self._units())

    def _is_many(self) -> bool:
        return len(self._pending) > EXHAUSTIVE

    def _is_torn(self) -> bool:
        return sum(map(len, self._parts.values())) <= EXHAUSTIVE

    def _units(self) -> list[Unit]:
        if self._is_torn():
            return [part for number in self._pending for part in self._parts[number]]
        return list(self._pending.values())

    def _enumerate(self) -> None:
        """Every subset of what is pending, anew."""
        self._losses = None
        if self._is_many():
            return
        units = self._units()
        self._nunits = len(units)
        losses = {self._base.identity(): self._base}
        for unit in units:
            losses = doubled(losses, self._stable, unit)
        self._losses = losses

    def _after_power(self, entry: object) -> Iterator[Disk]:
        if self._losses is not None:
            yield from self._losses.values()
            if not self._is_torn():
                yield from self._disks(self._torn(entry))
        else:
            yield from self._disks(self._many(entry))

    def _disks(self, choices: Iterator[Sequence[Unit]]) -> Iterator[Disk]:
        """Each disk once, with how many of *choices* lead to it."""
        disks: dict[int, Disk] = {}
        for choice in choices:
            merge(disks, reached(self._base, self._stable, choice))
        yield from disks.values()

    def _torn(self, entry: object) -> Iterator[Sequence[Unit]]:
        """Samples of torn writes: the newest, if it has come now, with nothing and with everything else."""
        numbers = list(self._pending)
        if isinstance(entry, Issued) and len(self._parts[numbers[-1]]) > 1:
            parts = self._parts[numbers[-1]]
            others = [self._pending[number] for number in numbers[:-1]]
            middle, one = len(parts) // 2, self._draw.randrange(len(parts))
            for torn in (parts[:middle], parts[middle:], [parts[one]], parts[:one] + parts[one + 1 :]):
                yield torn
                yield others + torn
        every = [part for number in numbers for part in self._parts[number]]
        for _ in range(SAMPLES):
            yield [part for part in every if self._draw.random() < 0.5]

    def _many(self, entry: object) -> Iterator[Sequence[Unit]]:
        units = list(self._pending.values())
        yield []
        yield units
        for index, unit in enumerate(units):
            yield [unit]
            yield units[:index] + units[index + 1 :]
        pairs = list(combinations(range(len(units)), 2))
        for one, other in self._draw.sample(pairs, min(PAIRS, len(pairs))):
            yield [units[one], units[other]]
            yield [unit for index, unit in enumerate(units) if index not in (one, other)]
        for _ in range(SAMPLES):
            yield [unit for unit in units if self._draw.random() < 0.5]
        yield from self._torn(entry)

    def _after_kill(self) -> Iterator[Disk]:
        """The page cache: complete operations, and any subset of those in flight while they are few."""
        base = reached(self._base, self._stable, ())
        disks = {base.identity(): base}
        few = len(self._in_flight) <= EXHAUSTIVE // 2
        for number, unit in self._pending.items():
            if number in self._in_flight and few:
                disks = doubled(disks, self._stable, unit)
            else:
                kept: dict[int, Disk] = {}
                for disk in disks.values():
                    merge(kept, disk.with_unit(self._stable, unit))
                disks = kept
        yield from disks.values()
        if not few:
            lost = [unit for number, unit in self._pending.items() if number not in self._in_flight]
            yield reached(self._base, self._stable, lost)

    def _make(self, disk: Disk, *, power: bool) -> SimulatedFile:
        file = disk.file(self._stable)
        if not power:
            file.memory.store(0, bytes(self._memory.content))
        return file

    def _require(self, disk: Disk, position: int, *, power: bool) -> None:
        """Judge *disk*, found after a death at *position*."""
        self.scene.count.states += disk.states
        identity = disk.identity()
        if not power and any(self._memory.content):
            identity = hash((identity, bytes(self._memory.content)))
        try:
            opened = self.scene.open(identity, lambda: self._make(disk, power=power))
            moment, was_power = self._at or (position, False)
            self._judge.judge(opened.seen, moment, power=power or was_power)
            self.scene.judge_outside(disk.states, lambda: self._make(disk, power=power))
        except Violation as violation:
            raise Violation(f"{self._name(position, disk.kept, power=power)}: {violation}") from violation
        is_recovered = opened.was_recovered or opened.leaks > 0
        if is_recovered and self._at is None and self.scene.is_to_recover((identity, power or self._base.identity())):
            for how in RECOVERIES:
                self.scene.count.recoveries += 1
                walk, begun = self._recover(position, disk.kept, power=power, how=how)
                walk.visit(begun)

    def _require_copy(self, copy: Copy, position: int) -> None:
        """Judge *copy*, put back after a death at *position*: by its own moment."""
        self.scene.count.states += 1
        self.scene.count.copies += 1
        file, is_known = copy.put_back(bytes(self._memory.content))
        identity = copy.disk.identity()
        if any(file.memory.content):
            identity = hash((identity, bytes(file.memory.content)))
        try:
            opened = self.scene.open(identity, lambda: file)
            self._judge.judge(opened.seen, copy.position, power=not is_known)
        except Violation as violation:
            death = f"restored {copy.position}"
            raise Violation(
                f"{self.run.name}/{position},{death},{'-'.join(copy.disk.kept)}: {violation}"
            ) from violation

    def _name(self, position: int, kept: Sequence[str], *, power: bool) -> str:
        return f"{self.run.name}/{position},{'power' if power else 'kill'},{'-'.join(kept)}"

    def _recover(self, position: int, kept: Sequence[str], *, power: bool, how: str) -> tuple["Walk", int]:
        """The walk over a recovery after a death at *position*, and where in its journal that begins.

        What a killed process has written, and not synced, waits in the page cache until the recovery does.
        """
        effects = [unit.effect for unit in self._named(kept)]
        initial = self._stable.copy()
        if power:
            for effect in effects:
                effect.apply(initial)
            effects = []
        else:
            initial.memory.store(0, bytes(self._memory.content))
        where = f"{self._name(position, kept, power=power)}/{how}"
        run, begun = recovery(where, initial, effects, self.scene.backing, self.run.history)
        return Walk(run, self.scene, self._seed, judge=self._judge, at=(position, power)), begun


def recovery(
    where: str, initial: SimulatedFile, pending: Iterable[Effect], backing: SimulatedFile | None, history: History
) -> tuple[Run, int]:
    """What comes after a death, by the last word of *where*, as a run; and the length of its journal at the start.

    Of what the death left *initial* is stable, and the memory; *pending* is only complete.
    """
    file = initial.after_kill()
    driver = CrashDriver()
    for effect in pending:
        driver.do_at_once(replace(effect, file=file))
    begun = len(driver.journal)
    mode = RECOVERIES[where.rpartition("/")[2]]
    try:
        driver.run(open_image(file, backing) if mode is None else check_and_repair(file, mode))
    except ERRORS as error:
        raise Violation(f"{where}: {type(error).__name__}: {error}") from error
    return Run(where, initial, file, driver.journal, history), begun


async def check_and_repair(file: SimulatedFile, mode: RepairMode) -> None:
    """As the tool does, whether the image is dirty or not."""
    await replay_log(file)
    await repair(file, mode)
