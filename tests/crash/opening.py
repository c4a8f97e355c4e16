"""Opening what a death left, as the daemon would, and saying what its guest sees then."""

from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.operation import Compute, Occupied, Operation, Read, ReadInto, Resize, Size, Store, Write, Zero
from qcow2.driver.task import Scheduler, Task
from qcow2.engine.image import Image
from qcow2.error import ImageError
from qcow2.judge.check import check
from qcow2.judge.repair import repair
from qcow2.judge.report import Report
from qcow2.plane.l2cache import Kind
from tests.crash.driver import SimulatedFile, effect_of, occupied, simulated, simulated_memory
from tests.crash.explorer import Violation
from tests.crash.history import SECTOR, SIZE, ZEROS, size_sector
from tests.crash.images import check_image, open_image

ERRORS = (ImageError, OSError, ValueError, LookupError, ArithmeticError)
Seen = dict[int, bytes]  # the guest's sectors that are not zeros, and SIZE


class DirectDriver:
    """Runs coroutines on simulated files, each operation done at once; counts those that change something."""

    def __init__(self) -> None:
        self.changes = 0
        self._scheduler = Scheduler(self._start)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run *coroutine* to its end; its result, or its exception."""
        ended: list[Task] = []
        self._scheduler.spawn(coroutine, ended.append)
        self._scheduler.run()
        if ended[0].error is not None:
            raise ended[0].error
        return ended[0].result

    def _start(self, task: Task, operation: Operation) -> None:
        self._scheduler.resume(task, self._perform(operation))

    def _perform(self, operation: Operation) -> Any:
        match operation:
            case Read():
                return simulated(operation.file).read(operation.host_offset, operation.nbytes)
            case ReadInto():
                content = simulated(operation.file).read(operation.host_offset, len(operation.target))
                return operation.target.store(content)
            case Size():
                return simulated(operation.file).size
            case Write() | Zero() | Resize():
                self.changes += 1
                effect = effect_of(operation)
                assert effect is not None
                return effect.apply(effect.file)
            case Store():
                for offset, data in operation.parts:
                    simulated_memory(operation.memory).store(offset, data)
                if operation.mark is not None:
                    simulated(operation.mark.file).write(operation.mark.host_offset, operation.mark.data)
                return None
            case Compute():
                return operation.function()
            case Occupied():
                return occupied(operation)
            case _:
                return None


@dataclass(frozen=True, slots=True)
class Opened:
    """A state that could be opened: what its guest sees, the file after that, clusters that nothing refers to."""

    seen: Seen
    file: SimulatedFile
    leaks: int
    was_recovered: bool  # replayed or repaired


_names: dict[bytes, bytes] = {}  # one object for each content: many states show the same


def open_state(file: SimulatedFile, backing: SimulatedFile | None, data: SimulatedFile | None = None) -> Opened:
    """Open *file*, which a death left, read all of it and close it; its data may be in *data*.

    Raises: Violation if it does not open, if our check objects, or if a second repair has something left to do.
    """
    driver = DirectDriver()
    try:
        was_dirty = is_dirty(file)
        image = driver.run(open_image(file, backing, data=data))
        was_recovered = driver.changes > 0
        leaks = require_sound(driver, file, again=was_dirty)
        changes = driver.changes
        seen: Seen = driver.run(look(image))
        driver.run(image.close())
        if driver.changes != changes:
            require_sound(driver, file, again=False)
    except ERRORS as error:
        raise Violation(f"{type(error).__name__}: {error}") from error
    return Opened(seen, file, leaks, was_recovered)


def is_dirty(file: SimulatedFile) -> bool:
    """Whether the next open repairs it."""
    version, features = file.read(4, 4), file.read(72, 8)
    return version == b"\0\0\0\3" and bool(features[7] & 1)


def require_sound(driver: DirectDriver, file: SimulatedFile, *, again: bool) -> int:
    """Check, or repair *again*, which must change nothing; how many clusters are leaked."""
    changes = driver.changes
    report: Report = driver.run(repair(file) if again else check(file))
    if report.corruptions or report.check_errors:
        driver.run(check_image(file))
        raise Violation(f"{report}")
    if driver.changes != changes:
        raise Violation("a second repair changed something")
    return report.leaks


async def look(image: Image) -> Seen:
    """The whole disk as the guest sees it."""
    seen = {SIZE: size_sector(image.size)}
    shown = 0 if image.backing is None else image.backing.size
    offset = 0
    while offset < image.size:
        run = await image.resolve(offset, image.size - offset)
        nbytes = run.nbytes
        if run.kind == Kind.UNALLOCATED:
            nbytes = max(0, min(nbytes, shown - offset))
        if run.kind not in (Kind.ZERO_PLAIN, Kind.ZERO_ALLOCATED) and nbytes:
            target = bytearray(nbytes)
            await image.read(offset, MemoryBuffer(memoryview(target)))
            take(seen, offset // SECTOR, bytes(target))
        offset += run.nbytes
    return seen


def take(seen: Seen, first: int, content: bytes) -> None:
    """Add *content*, which begins with sector *first*."""
    for start in range(0, len(content), SECTOR):
        piece = content[start : start + SECTOR]
        if piece != ZEROS:
            seen[first + start // SECTOR] = _names.setdefault(piece, piece)
