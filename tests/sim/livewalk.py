"""What deaths leave of a chain that changes while it is served: some at every entry of the journal, opened and judged.

A kill keeps what is complete, of what is in flight any part, and all shared memory. A power loss keeps what is stable,
and of the rest any part: of names as of files. The next daemon opens what has the path.
"""

import logging
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qcow2.driver.boot import UNIT, Boot
from qcow2.error import ImageError
from qcow2.format.header import read_header
from qcow2.judge.repair import repair
from qcow2.node import recovery
from qcow2.plane.linklog import RECORDS_OFFSET, read_log
from tests.bitmapreader import read_bitmaps
from tests.crash.driver import Completed, Effect, Issued, Mark, SimulatedFile, SimulatedMemory, Stored, Synced
from tests.crash.explorer import Violation as CrashViolation
from tests.crash.history import SECTOR
from tests.crash.opening import DirectDriver, Seen, is_dirty, look, require_sound
from tests.engine import ORIGIN
from tests.sim.livehost import open_chain
from tests.sim.livejudge import LiveJudge, Said
from tests.sim.livelife import LiveWorld
from tests.sim.trouble import Violation
from tests.sim.units import Units

logging.getLogger("qcow2").setLevel(logging.CRITICAL)

POWER_STATES = 3  # of a moment
MAGIC = b"QFI\xfb"
LOOKS_BELOW = 4  # every so many states what is frozen is looked at, too
Files = dict[str, SimulatedFile]
Log = tuple[bytes, ...]


@dataclass(slots=True)
class State:
    """What the next process finds."""

    files: Files
    logs: list[bytes]
    is_power: bool

    def identity(self) -> int:
        """Alike for states that are the same."""
        return hash((identity_of(self.files.values()), tuple(self.logs), self.is_power))


@dataclass(slots=True)
class Found:
    """What was in a state."""

    seen: Seen
    said: Said


class FoundFile(SimulatedFile):
    """A file of the state that is looked at; nobody asks the host for its descriptor."""

    __slots__ = ()
    fd = -1


class FoundMemory(SimulatedMemory):
    """A log of the state that is looked at."""

    __slots__ = ()

    def load(self, is_trusted: Callable[[int], bool], nbytes: int | None = None) -> bytes:
        return bytes(self.content[:nbytes])


class Place:
    """The host as `qcow2.node.recovery`, which ships, finds it in a state."""

    def __init__(self, driver: DirectDriver, state: State) -> None:
        self.driver = driver
        self._files = state.files
        self._logs = [FoundMemory(content) for content in state.logs]

    @contextmanager
    def open(self, namer: str, role: str, name: str, *, writable: bool) -> Iterator[SimulatedFile]:
        """As a gate does."""
        file = self._files[name]
        was_writable, file.writable = file.writable, writable
        yield file
        file.writable = was_writable

    def find_log(self, tag: int, directory: str) -> FoundMemory | None:
        for memory in self._logs:
            found = read_log(bytes(memory.content))
            if found is not None and found.tag == tag:
                return memory
        return None

    @contextmanager
    def here(self, *, is_power: bool) -> Iterator[None]:
        """Let recovery find this host."""
        named: dict[str, Any] = {
            "run": self.driver.run,
            "find_log": self.find_log,
            "all_logs": lambda directory: [],
            "lock_image": lambda *arguments, **named: None,
            "remove_log": lambda memory: memory.store(0, bytes(RECORDS_OFFSET)),
            "_is_of": lambda file, found: True,
            "this_boot": lambda: Boot(1000 * UNIT, bytes(16)) if is_power else ORIGIN.boot,
        }
        before = {name: getattr(recovery, name) for name in named}
        vars(recovery).update(named)
        try:
            yield
        finally:
            vars(recovery).update(before)


def open_state(state: State, top: str) -> Found:
    """Open what has the path, as the daemon would; what its guest sees, and its bitmaps say. Raises: Violation."""
    driver = DirectDriver()
    place: Any = Place(driver, state)
    file: Any = state.files[top]
    before = read_bitmaps(file.read)
    try:
        with place.here(is_power=state.is_power):
            recovery.recover(file, "logs", gate=place)
        if is_dirty(file):
            report = driver.run(repair(file))
            if report.corruptions or report.check_errors or report.leaks:
                raise Violation(f"{report} after repair")
        image = driver.run(open_chain(state.files, top, writable=True))
        require_sound(driver, file, again=False)
        seen: Seen = driver.run(look(image))
        driver.run(image.close())
    except (ImageError, OSError, ValueError, LookupError, ArithmeticError, CrashViolation) as error:
        raise Violation(f"{type(error).__name__}: {error}") from error
    return Found(seen, Said.of(before, read_bitmaps(file.read)))


class LiveWalk:
    """Visits deaths of *world*, which has been run."""

    def __init__(self, world: LiveWorld) -> None:
        self.states = self.opened = 0
        self._world = world
        self._draw = random.Random(world.seed)
        self._units = Units(world.initial)
        self._memories = {id(memory): bytearray(content) for memory, content in world.memories.items()}
        self._judge = LiveJudge(world.history, world.kernel.journal, world.ledger)
        self._known: dict[int, Found] = {}  # by identity of the state
        self._seen: dict[frozenset[tuple[int, bytes]], Seen] = {}  # the judge tells them apart by their places
        self._copies: dict[int, Seen] = {}  # by identity of the copy

    def visit(self) -> int:
        """How many states were judged. Raises: Violation; its message names the state."""
        for position, entry in enumerate(self._world.kernel.journal):
            self._units.take(entry)
            if isinstance(entry, Stored):
                content = self._memories[id(entry.memory)]
                content[entry.offset : entry.offset + len(entry.data)] = entry.data
            if isinstance(entry, Issued | Completed | Synced | Stored):
                self._visit(position + 1)
            elif isinstance(entry, Mark) and entry.what[0] == "end":  # what is promised from now on
                self._judge_state(position + 1, self._killed(), is_power=False)
                self._judge_state(position + 1, [], is_power=True)
        return self.states

    def _visit(self, position: int) -> None:
        self._judge_state(position, self._killed(), is_power=False)
        parts = [part for effect in self._units.pending.values() for part in effect.tear()]
        for kept in self._kept(parts):
            self._judge_state(position, kept, is_power=True)

    def _killed(self) -> list[Effect]:
        """All that is complete, and any part of what is in flight."""
        in_flight = self._units.in_flight
        return [
            effect
            for number, effect in self._units.pending.items()
            if number not in in_flight or self._draw.random() < 0.5
        ]

    def _kept(self, parts: list[Effect]) -> Iterator[list[Effect]]:
        """Some of what a power loss may keep of *parts*."""
        if not parts:
            yield []
            return
        for share in self._draw.sample((0.0, 0.1, 0.5, 0.9, 1.0), POWER_STATES - 1):
            yield [part for part in parts if self._draw.random() < share]
        odd = self._draw.randrange(len(parts))
        yield self._draw.choice(([parts[odd]], [*parts[:odd], *parts[odd + 1 :]]))

    def _judge_state(self, position: int, effects: Iterable[Effect], *, is_power: bool) -> None:
        self.states += 1
        after = self._units.after(effects).items()
        files: Files = {file.path: FoundFile(file.path, content.sectors, content.size) for file, content in after}
        logs = [] if is_power else [bytes(content) for content in self._memories.values()]
        top = files["names"].read(0, SECTOR).decode().rstrip()
        state = State(files, logs, is_power)
        identity = state.identity()
        try:
            known = self._known.get(identity)
            if known is None:
                self.opened += 1
                known = self._known[identity] = open_state(state, top)
                known.seen = self._place_of(known.seen)
                if self.opened % LOOKS_BELOW == 0:
                    self._judge_frozen(state, top, position)
                self._judge_copies(state, position)
            self._judge.judge(known.seen, position, power=is_power)
            self._judge.judge_bitmaps(known.seen, known.said, top, position, power=is_power)
        except (Violation, CrashViolation) as error:
            death = "power" if is_power else "kill"
            raise Violation(f"state {self.states}: {death} at {position}, {top} has the path: {error}") from error

    def _place_of(self, seen: Seen) -> Seen:
        return self._seen.setdefault(frozenset(seen.items()), seen)

    def _judge_frozen(self, state: State, top: str, position: int) -> None:
        """What a snapshot froze is what the disk held then, as soon as the overlay has the path."""
        ledger = self._world.ledger
        for frozen in ledger.frozen:
            is_served = int(top[1:]) > int(frozen.path[1:])
            if is_served and frozen.position < position and not ledger.has_committed:
                self._judge.judge(self._look(state, frozen.path), frozen.position, power=state.is_power)

    def _judge_copies(self, state: State, position: int) -> None:
        """A copy is what the disk held at its moment, or no image at all."""
        ledger = self._world.ledger
        for copy in ledger.copies:
            if copy.is_over_base and ledger.has_committed:
                continue
            is_made = copy.made is not None and position >= copy.made
            if is_made or (not copy.was_open and state.files[copy.path].read(0, len(MAGIC)) == MAGIC):
                identity = identity_of(state.files[name] for name in chain_of(state.files, copy.path))
                if identity not in self._copies:
                    self._copies[identity] = self._look(state, copy.path)
                try:
                    self._judge.judge(self._copies[identity], copy.position, power=False)
                except CrashViolation as error:
                    raise Violation(f"{copy.path}, of {copy.position}: {error}") from error

    def _look(self, state: State, name: str) -> Seen:
        """What the image *name* shows."""
        driver = DirectDriver()
        try:
            return self._place_of(driver.run(look(driver.run(open_chain(state.files, name)))))
        except (ImageError, OSError, ValueError, LookupError) as error:
            raise Violation(f"{name}: {type(error).__name__}: {error}") from error


def identity_of(files: Iterable[SimulatedFile]) -> int:
    """Alike for the same content."""
    return hash(tuple((file.path, file.size, frozenset(file.sectors.items())) for file in files))


def chain_of(files: Files, name: str) -> Iterator[str]:
    """The image *name*, and those under it by their headers."""
    below: str | None = name
    while below is not None:
        yield below
        below = DirectDriver().run(read_header(files[below], trust_refcounts=False)).backing_name
