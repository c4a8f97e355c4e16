"""The crash driver: a simulated host under the unchanged engine; it remembers what a death may leave behind.

Operations in flight complete one at a time in an order drawn from a seed; each takes effect, or looks at the file, when
it is issued or when it completes, as the seed says: whatever overtakes it meanwhile is seen to do so. Some transfers
are slow, and many requests begin and end before they complete. What was issued and completed is appended to a journal;
`points` replays it and tells, at each moment, which effects were stable and which were pending. Two deaths: *kill*
keeps every completed effect, may keep those in flight, and keeps the shared memory; *power* keeps the stable effects
and any subset of the pending ones, torn at sectors of 512 bytes, and no shared memory.
"""

import random
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from qcow2.driver.operation import (
    Allocated,
    Compute,
    Grace,
    Occupied,
    Operation,
    Read,
    ReadInto,
    Resize,
    Size,
    Store,
    Sync,
    Write,
    WriteSome,
    Zero,
)
from qcow2.driver.task import Scheduler, Task

SECTOR = 512
ZEROS = bytes(SECTOR)
SLOW = 1 / 32  # of the transfers; without them a freed cluster never finds a new owner before the old one's write lands
LATEST = 24  # operations before what is spawned begins
PATIENCE = 400  # completions that overtake a slow one, on average
TRANSFERS = (Read, ReadInto, Write, Zero)


class SimulatedMemory:
    """Shared memory of a simulated host: a kill leaves it, a power loss does not; grows as it is stored to."""

    __slots__ = ("address", "content", "is_lost", "path")

    def __init__(self, content: bytes | bytearray = b"") -> None:
        self.path = "memory"
        self.address = 0  # no data plane stores to it
        self.is_lost = False
        self.content = bytearray(content)

    def reserve(self, nbytes: int) -> None:
        """It grows as it is stored to."""

    def window(self, offset: int) -> None:
        """No data plane stores to it."""

    def store(self, offset: int, data: bytes) -> None:
        """Put *data* there."""
        if offset > len(self.content):
            self.content.extend(bytes(offset - len(self.content)))
        self.content[offset : offset + len(data)] = data


class SimulatedFile:
    """A sparse host file in memory: sectors that differ from zeros, and a length; an `operation.File`.

    Its `memory` is the shared memory that belongs to it; a copy of the file has none of it.
    """

    __slots__ = ("memory", "path", "sectors", "size", "writable")

    def __init__(self, path: str, sectors: dict[int, bytes], size: int, *, writable: bool = True) -> None:
        self.path = path
        self.sectors = sectors
        self.size = size
        self.writable = writable
        self.memory = SimulatedMemory()

    @classmethod
    def parse(cls, path: str, content: bytes) -> "SimulatedFile":
        """A file that holds *content*."""
        file = cls(path, {}, 0)
        file.write(0, content)
        return file

    def copy(self) -> "SimulatedFile":
        """A file of its own with the same bytes."""
        return SimulatedFile(self.path, dict(self.sectors), self.size, writable=self.writable)

    def after_kill(self) -> "SimulatedFile":
        """A copy as the next process finds it, with the shared memory."""
        file = self.copy()
        file.memory.store(0, bytes(self.memory.content))
        return file

    def read(self, host_offset: int, nbytes: int) -> bytes:
        """The bytes there; zeros past the end."""
        first, start = divmod(host_offset, SECTOR)
        last = -(-(host_offset + nbytes) // SECTOR)
        get = self.sectors.get
        whole = b"".join([get(sector, ZEROS) for sector in range(first, last)])
        return whole[start : start + nbytes]

    def write(self, host_offset: int, data: bytes) -> None:
        """Put *data* there, growing the file if it ends past its end."""
        for sector, piece in split_sectors(host_offset, data):
            self.put(sector, piece)
        self.size = max(self.size, host_offset + len(data))

    def put(self, sector: int, piece: tuple[int, bytes]) -> None:
        """Change part of one sector."""
        start, data = piece
        if len(data) != SECTOR:
            old = self.sectors.get(sector, ZEROS)
            data = old[:start] + data + old[start + len(data) :]
        if data == ZEROS:
            self.sectors.pop(sector, None)
        else:
            self.sectors[sector] = data

    def zero(self, host_offset: int, nbytes: int) -> None:
        """Punch: zeros there, the length unchanged."""
        size = self.size
        self.write(host_offset, bytes(min(nbytes, max(0, size - host_offset))))
        self.size = size

    def resize(self, nbytes: int) -> None:
        """Cut or extend with zeros."""
        if nbytes < self.size:
            for sector in [sector for sector in self.sectors if sector >= -(-nbytes // SECTOR)]:
                del self.sectors[sector]
            if nbytes % SECTOR:
                self.put(nbytes // SECTOR, (nbytes % SECTOR, bytes(SECTOR - nbytes % SECTOR)))
        self.size = nbytes

    def content(self) -> bytes:
        """All of it."""
        return self.read(0, self.size)


def split_sectors(host_offset: int, data: bytes) -> Iterator[tuple[int, tuple[int, bytes]]]:
    """Cut a write at sector borders: (sector, (start within it, bytes))."""
    done = 0
    while done < len(data):
        sector, start = divmod(host_offset + done, SECTOR)
        piece = data[done : done + SECTOR - start]
        yield sector, (start, piece)
        done += len(piece)


@dataclass(frozen=True, slots=True)
class Effect:
    """One change of a file: a write (data), a punch (nbytes) or a new length (nbytes)."""

    kind: str  # "write" | "zero" | "resize"
    file: SimulatedFile
    host_offset: int
    data: bytes
    nbytes: int

    def apply(self, file: SimulatedFile) -> None:
        """Make the change."""
        if self.kind == "write":
            file.write(self.host_offset, self.data)
        elif self.kind == "zero":
            file.zero(self.host_offset, self.nbytes)
        else:
            file.resize(self.nbytes)

    def tear(self) -> list["Effect"]:
        """The parts that a power loss may keep or lose one by one: a write's sectors."""
        if self.kind != "write" or len(self.data) <= SECTOR:
            return [self]
        return [
            Effect("write", self.file, sector * SECTOR + start, data, len(data))
            for sector, (start, data) in split_sectors(self.host_offset, self.data)
        ]


@dataclass(frozen=True, slots=True)
class Issued:
    """Journal: the operation *number* began; its effect may reach the disk from now on."""

    number: int
    effect: Effect


@dataclass(frozen=True, slots=True)
class Completed:
    """Journal: the operation *number* was reported done."""

    number: int
    is_late: bool = False  # it took effect only now, over what those issued after it had done


@dataclass(frozen=True, slots=True)
class Synced:
    """Journal: the effects *numbers* of *file*, all that were complete when the sync started, are stable."""

    file: SimulatedFile
    numbers: frozenset[int]


@dataclass(frozen=True, slots=True)
class Stored:
    """Journal: *data* was put into shared memory, at once and in this order."""

    memory: SimulatedMemory
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Mark:
    """Journal: something the workload wants to find again, such as a guest's request or its acknowledgement."""

    what: Any


Entry = Issued | Completed | Synced | Stored | Mark


class Deadlock(Exception):
    """Nothing is in flight, and the task has not ended."""


@dataclass(slots=True)
class InFlight:
    """An operation under way."""

    number: int
    task: Task
    operation: Operation
    covered: frozenset[int]  # what a Sync makes stable, or what a Grace waits for
    effect: Effect | None
    is_late: bool  # it takes effect when it completes, not when it was issued
    is_slow: bool
    value: Any = None  # of a read that has looked already


class CrashDriver:
    """Runs coroutines against `SimulatedFile`s, completing their operations in an order drawn from *seed*.

    *fault(operation)* may return an OSError, which fails that operation without any effect. *at_once*: as with the
    ring, half of the operations that need not wait complete as they begin, and others several together before a task
    goes on; and what is spawned begins a few operations later.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        fault: Callable[[Operation], OSError | None] | None = None,
        limit: int = 1_000_000,
        at_once: bool = False,
    ) -> None:
        self.random = random.Random(seed)
        self.journal: list[Entry] = []
        self.operations = 0
        self._at_once = at_once
        self._limit = limit
        self._fault = fault
        self._in_flight: list[InFlight] = []
        self._pending: dict[int, SimulatedFile] = {}  # complete and not yet synced
        self._scheduler = Scheduler(self._start)

    def spawn(self, coroutine: Coroutine[Any, Any, Any], on_done: Callable[[Task], None] | None = None) -> Task:
        """Start *coroutine* beside the others."""
        if self._at_once:
            coroutine = _later(self.random.randrange(LATEST), coroutine)
        return self._scheduler.spawn(coroutine, on_done)

    def mark(self, what: Any) -> None:
        """Note *what* in the journal."""
        self.journal.append(Mark(what))

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run *coroutine*, and whatever it spawned, to the end; its result, or its exception."""
        task = self.spawn(coroutine, lambda ended: None)
        self.finish()
        if not task.done:
            raise Deadlock(coroutine)
        if task.error is not None:
            raise task.error
        return task.result

    def finish(self) -> None:
        """Complete operations until none is in flight and no task is ready."""
        self._scheduler.run()
        while self._in_flight:
            self._complete(self._in_flight.pop(self._choose()))
            while self._in_flight and self._is_at_once():
                self._complete(self._in_flight.pop(self._choose()))
            self._scheduler.run()

    def _is_at_once(self) -> bool:
        return self._at_once and self.random.random() < 0.5

    def store(self, memory: SimulatedMemory, offset: int, data: bytes) -> None:
        """Put *data* into *memory*, as a `Store` or a data plane does."""
        self.journal.append(Stored(memory, offset, data))
        memory.store(offset, data)

    def write_at_once(self, file: SimulatedFile, host_offset: int, data: bytes) -> None:
        """What a data plane does on its own: a write that nothing else comes between."""
        self.do_at_once(Effect("write", file, host_offset, data, len(data)))

    def do_at_once(self, effect: Effect) -> None:
        """The same: any effect."""
        self.operations += 1
        self.journal.append(Issued(self.operations, effect))
        effect.apply(effect.file)
        self._pending[self.operations] = effect.file
        self.journal.append(Completed(self.operations))

    def sync_at_once(self, file: SimulatedFile) -> None:
        """The same: a sync."""
        numbers = frozenset(n for n, of in self._pending.items() if of is file)
        for number in numbers:
            del self._pending[number]
        self.journal.append(Synced(file, numbers))

    def _start(self, task: Task, operation: Operation) -> None:
        if isinstance(operation, WriteSome):  # each will be an operation of its own, which deaths come between
            self._scheduler.resume(task, 0)
            return
        self.operations += 1
        if self.operations > self._limit:
            raise AssertionError(f"more than {self._limit} operations: the engine spins")
        number = self.operations
        effect = effect_of(operation)
        fault = self._fault(operation) if self._fault else None
        if fault is not None:
            if isinstance(operation, Store):
                operation.undo()
            self._scheduler.fail(task, fault)
            return
        if isinstance(operation, Store):  # a store of the processor, and a write on its thread: never in flight
            for offset, data in operation.parts:
                self.store(simulated_memory(operation.memory), offset, data)
            if operation.mark is not None:
                self.write_at_once(simulated(operation.mark.file), operation.mark.host_offset, operation.mark.data)
            self._scheduler.resume(task)
            return
        is_late = self.random.random() < 0.5
        is_slow = isinstance(operation, TRANSFERS) and self.random.random() < SLOW
        begun = InFlight(number, task, operation, self._covered(operation), effect, is_late, is_slow)
        if effect is not None:
            assert effect.file.writable, f"write to read-only {effect.file.path}"
            self.journal.append(Issued(number, effect))
            if not begun.is_late:
                effect.apply(effect.file)
        elif not begun.is_late and isinstance(operation, Read | ReadInto):
            begun.value = look(operation)
        if not isinstance(operation, Sync | Grace) and self._is_at_once():
            self._complete(begun)
        else:
            self._in_flight.append(begun)

    def _covered(self, operation: Operation) -> frozenset[int]:
        if isinstance(operation, Sync):
            return frozenset(n for n, file in self._pending.items() if file is operation.file)
        if isinstance(operation, Grace):
            waiting = (Grace, Sync, Compute)
            return frozenset(other.number for other in self._in_flight if not isinstance(other.operation, waiting))
        return frozenset()

    def _complete(self, done: InFlight) -> None:
        match done.operation:
            case Write() | Zero() | Resize():
                assert done.effect is not None
                if done.is_late:
                    done.effect.apply(done.effect.file)
                self._pending[done.number] = done.effect.file
                self.journal.append(Completed(done.number, done.is_late))
            case Sync():
                for n in done.covered:
                    self._pending.pop(n, None)
                self.journal.append(Synced(simulated(done.operation.file), done.covered))
            case _:
                pass
        try:
            value = perform(done)
        except Exception as error:  # of a Compute: it belongs to the coroutine that awaits
            self._scheduler.fail(done.task, error)
        else:
            self._scheduler.resume(done.task, value)

    def _choose(self) -> int:
        """Which of the operations in flight completes now; a Grace waits for those it covers, a slow one for others."""
        if len(self._in_flight) == 1:
            return 0
        numbers = {one.number for one in self._in_flight}
        able = [
            index
            for index, one in enumerate(self._in_flight)
            if not (isinstance(one.operation, Grace) and one.covered & numbers)
        ]
        quick = [index for index in able if not self._in_flight[index].is_slow]
        return self.random.choice(quick if quick and self.random.random() >= 1 / PATIENCE else able)


async def _later(noperations: int, coroutine: Coroutine[Any, Any, Any]) -> Any:
    for _ in range(noperations):
        await Compute(lambda: None)
    return await coroutine


def simulated(file: Any) -> SimulatedFile:
    """*file*, which this driver was given, as what it is."""
    assert isinstance(file, SimulatedFile)
    return file


def simulated_memory(memory: Any) -> SimulatedMemory:
    """*memory*, which this driver was given, as what it is."""
    assert isinstance(memory, SimulatedMemory)
    return memory


def piece_bytes(piece: Any) -> bytes:
    """The bytes of one piece of a Write."""
    return bytes(piece) if isinstance(piece, bytes | bytearray | memoryview) else bytes(piece.load())


def effect_of(operation: Operation) -> Effect | None:
    """What *operation* changes, its data copied now."""
    match operation:
        case Write():
            data = b"".join(map(piece_bytes, operation.pieces))
            return Effect("write", simulated(operation.file), operation.host_offset, data, len(data))
        case Zero():
            return Effect("zero", simulated(operation.file), operation.host_offset, b"", operation.nbytes)
        case Resize():
            return Effect("resize", simulated(operation.file), 0, b"", operation.nbytes)
        case _:
            return None


def look(operation: Read | ReadInto) -> bytes:
    """What a read finds now."""
    nbytes = operation.nbytes if isinstance(operation, Read) else len(operation.target)
    return simulated(operation.file).read(operation.host_offset, nbytes)


def occupied(operation: Occupied) -> tuple[bool, int]:
    """Whether sectors are there, which is all that this host knows of holes."""
    sectors, end = simulated(operation.file).sectors, operation.host_offset + operation.nbytes
    sector = operation.host_offset // SECTOR
    is_data, sector = sector in sectors, sector + 1
    while sector * SECTOR < end and (sector in sectors) == is_data:
        sector += 1
    return is_data, min(sector * SECTOR, end) - operation.host_offset


def perform(done: InFlight) -> Any:
    """The result of an operation that completes now."""
    match done.operation:
        case Size() | Allocated():
            return simulated(done.operation.file).size
        case Occupied():
            return occupied(done.operation)
        case Read():
            return look(done.operation) if done.is_late else done.value
        case ReadInto():
            done.operation.target.store(look(done.operation) if done.is_late else done.value)
            return None
        case Compute():
            return done.operation.function()
        case _:
            return None


@dataclass(slots=True)
class Point:
    """A moment at which death may strike: what is stable, and what is pending in the order it took effect."""

    position: int  # entries of the journal that had happened
    stable: SimulatedFile
    pending: list[tuple[int, Effect]]
    memory: SimulatedMemory
    stores: int  # how many there were

    def after_kill(self) -> SimulatedFile:
        """The file as the next process finds it: every issued effect, in order, and its shared memory."""
        file = self.keep(effect for _, effect in self.pending)
        file.memory.store(0, bytes(self.memory.content))
        return file

    def keep(self, effects: Iterable[Effect]) -> SimulatedFile:
        """The file after a power loss that left only *effects* of the pending ones on the disk."""
        file = self.stable.copy()
        for effect in effects:
            effect.apply(file)
        return file


def points(journal: list[Entry], initial: SimulatedFile, file: SimulatedFile) -> Iterator[Point]:
    """Every moment of *journal* at which the possible states of *file*, which began as *initial*, changed.

    The yielded Point is reused: take what you need before the next one.
    """
    stable = initial.copy()
    memory = SimulatedMemory(initial.memory.content)
    stores = 0
    pending: dict[int, Effect] = {}
    for position, entry in enumerate(journal):
        match entry:
            case Issued(number, effect) if effect.file is file:
                pending[number] = effect
            case Synced(synced, numbers) if synced is file:
                for number in [number for number in pending if number in numbers]:
                    pending.pop(number).apply(stable)
            case Stored(stored, offset, data) if stored is file.memory:
                memory.store(offset, data)
                stores += 1
            case Completed(number, is_late=True) if number in pending:
                pending[number] = pending.pop(number)
                continue
            case Mark():
                pass
            case _:
                continue
        yield Point(position + 1, stable, list(pending.items()), memory, stores)
