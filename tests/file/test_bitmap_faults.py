"""Law 11 on a host that fails: each operation of a workload fails once, and no bitmap says too little then."""

import errno
import itertools
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest

from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.operation import Operation, Read, ReadInto, Store, Sync, Write
from qcow2.engine.bitmapplan import BitmapPlan
from qcow2.engine.image import Image
from qcow2.error import ImageError, NotTried
from qcow2.format.layout import BITMAP_FLAGS, BITMAP_FLAGS_OFFSET, BitmapFlags
from qcow2.plane.linklog import LIMIT
from tests.bitmapreader import read_bitmaps
from tests.crash.bitmaps import NAMES, bitmap_opener
from tests.crash.driver import CrashDriver, SimulatedFile
from tests.crash.history import SECTOR, History
from tests.crash.images import open_image, start
from tests.crash.workload import Action, Guest
from tests.engine import Breaker

STEPS = [
    [Action("write", 3, 2), Action("write", 40, 3)],
    [Action("discard", 3, 1), Action("flush")],
    [Action("write", 90, 1)],
    [Action("reopen")],
    [Action("write", 5, 1), Action("zero", 41, 1)],
]
CLUSTER = 1 << 12  # of these images; in the first one is the header
FAILING = (Read, ReadInto, Write, Sync, Store)


class Failing:
    """Fails the operation number *number* with *error*."""

    def __init__(self, number: int, error: int) -> None:
        self.number = number
        self.error = error
        self.seen = 0

    def __call__(self, operation: Operation) -> OSError | None:
        if not isinstance(operation, FAILING) or (
            self.error == errno.ENOSPC and not isinstance(operation, Write | Store)
        ):
            return None
        self.seen += 1
        return OSError(self.error, "a fault of the test") if self.seen == self.number else None


def live(kind: str, fault: Failing) -> tuple[SimulatedFile, History]:
    """Run the steps as far as they go."""
    begun = start(kind)
    file, driver = begun.image.copy(), CrashDriver(2, fault=fault)
    history = History(begun.contents)
    with suppress(OSError, ImageError):
        guest: Any = Guest(driver, driver.run(open_image(file, begun.backing)), history)
        for number, step in enumerate(STEPS):
            for action in step:
                driver.spawn(guest.act(action))
            driver.finish()
            if step[0].kind == "reopen":
                driver.run(guest.image.close())
                guest.image = driver.run(open_image(file, begun.backing, life=number))
        driver.run(guest.image.close())
    return file, history


@pytest.mark.sample(2)
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.__getitem__)
@pytest.mark.parametrize("kind", ["bitmaps", "bitmaps-lazy", "bitmaps-backing"])
def test_no_fault_lets_a_bitmap_say_too_little(kind: str, error: int) -> None:
    look, nsectors = bitmap_opener(kind), len(start(kind).contents) // SECTOR
    for number in itertools.count(1):
        fault = Failing(number, error)
        file, history = live(kind, fault)
        if fault.seen < number:
            break
        seen = look(file.after_kill())
        for sector in range(nsectors):
            if seen[sector * SECTOR : (sector + 1) * SECTOR] != history.before(sector):
                before, after = seen[nsectors * SECTOR + sector], seen[nsectors * (SECTOR + 1) + sector]
                assert before & after & 1, f"operation {number}: sector {sector} has changed"
    assert number > 20


async def remove_all(plan: BitmapPlan) -> None:
    for name in NAMES:
        await plan.remove(name)


def test_a_log_whose_mark_found_no_space_is_followed_by_another() -> None:
    """The header does not say that bits are in it, so nobody has to bring them into the image before it may end."""
    begun = start("bitmaps-backing")
    file, is_full = begun.image.copy(), True

    def fault(operation: Operation) -> OSError | None:
        marks = isinstance(operation, Store) and operation.mark is not None
        return OSError(errno.ENOSPC, "a fault of the test") if is_full and marks else None

    driver = CrashDriver(2, fault=fault)
    image = driver.run(open_image(file, begun.backing))
    content = MemoryBuffer(memoryview(bytearray(b"x" * SECTOR)))
    with pytest.raises(OSError, match="a fault of the test"):
        driver.run(image.write(0, content))
    is_full = False
    driver.run(image.change_bitmaps(remove_all))
    links = image._changes.links
    assert links.log is not None
    links.log.native.first = links.log.native.next = LIMIT - 2
    tag = links.log.tag
    for cluster in range(6):
        driver.run(image.write(cluster << 12, content))
    assert links.log.tag != tag
    driver.run(image.close())


class FailingHeader:
    """Fails the write number *number* of the header with *error*, until it is mended."""

    def __init__(self, number: int, error: int) -> None:
        self.number = number
        self.error = error
        self.seen = 0
        self.is_mended = False

    def __call__(self, operation: Operation) -> OSError | None:
        if self.is_mended or not isinstance(operation, Write) or operation.host_offset >= CLUSTER:
            return None
        self.seen += 1
        return OSError(self.error, "a fault of the test") if self.seen == self.number else None


def goes_on_after(kind: str, fault: FailingHeader) -> bool:
    """Whether the bitmaps can be removed after that has failed, and the image be written."""
    begun = start(kind)
    driver = CrashDriver(2, fault=fault)
    image = driver.run(open_image(begun.image.copy(), begun.backing))
    with suppress(OSError):
        driver.run(image.change_bitmaps(remove_all))
    if fault.seen < fault.number:
        return True
    fault.is_mended = True
    try:
        driver.run(image.change_bitmaps(remove_all))
        driver.run(image.write(0, MemoryBuffer(memoryview(bytearray(b"x" * SECTOR)))))
        driver.run(image.close())
    except OSError:
        return False
    return True


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=errno.errorcode.__getitem__)
@pytest.mark.parametrize("kind", ["bitmaps", "bitmaps-backing"])
def test_a_header_that_found_no_space_is_written_again_later(kind: str, error: int) -> None:
    for number in itertools.count(1):
        fault = FailingHeader(number, error)
        goes_on = goes_on_after(kind, fault)
        if fault.seen < number:
            break
        assert goes_on == (error != errno.EIO), f"write {number} of the header"
    assert number > 2


async def add_one(image: Image) -> None:
    async def add(plan: BitmapPlan) -> None:
        await plan.add("third", None, enabled=True)

    await image.change_bitmaps(add)


async def grow(image: Image) -> None:
    await image.grow(image.size + CLUSTER)


@pytest.mark.parametrize(("kind", "error"), [(OSError, errno.EIO), (NotTried, errno.ENOMEM)])
@pytest.mark.parametrize("change", [add_one, grow])
def test_bitmaps_that_cannot_be_read_again_record_or_nothing_is_written(
    change: Callable[[Image], Coroutine[Any, Any, None]], kind: type[OSError], error: int
) -> None:
    refused = 0
    for number in itertools.count(1):
        reads = 0

        def fault(operation: Operation, number: int = number) -> OSError | None:
            nonlocal reads
            reads += isinstance(operation, Read)
            return kind(error, "a fault of the test") if isinstance(operation, Read) and reads == number else None

        begun, breaker = start("bitmaps"), Breaker()
        file, driver = begun.image.copy(), CrashDriver(2, fault=breaker)
        image = driver.run(open_image(file, begun.backing))
        breaker.fault = fault
        with suppress(OSError):
            driver.run(change(image))
        breaker.fault = None
        if reads < number:
            break
        try:
            driver.run(image.write(0, MemoryBuffer(memoryview(bytearray(b"x" * SECTOR)))))
            driver.run(image.close())
        except OSError:
            refused += 1
        else:
            said = read_bitmaps(file.read)
            assert all(0 in said[name].sectors() for name in NAMES), f"read {number}: sector 0 has changed"
    assert refused


@pytest.mark.parametrize("first", ["write", "grow"])
def test_bitmap_is_void_on_the_disk_before_anything_is_written_without_it(first: str) -> None:
    def fault(operation: Operation) -> OSError | None:
        return NotTried(errno.ENOMEM, "a fault of the test") if isinstance(operation, Sync) else None

    begun, breaker = start("bitmaps"), Breaker()
    file, driver = begun.image.copy(), CrashDriver(2, fault=breaker)
    content = MemoryBuffer(memoryview(bytearray(b"x" * SECTOR)))
    image = driver.run(open_image(file, begun.backing))
    driver.run(image.write(0, content))  # so that the next one needs no cluster
    driver.run(image.close())
    for each in driver.run(image.bitmaps()):
        file.write(each.bitmap.host_offset + BITMAP_FLAGS_OFFSET, BITMAP_FLAGS.pack(1 << 20 | BitmapFlags.AUTO))
    image = driver.run(open_image(file, begun.backing))
    assert image.bitmap_problems
    breaker.fault = fault
    with pytest.raises(NotTried):
        driver.run(grow(image) if first == "grow" else image.write(0, content))
    with pytest.raises(NotTried):
        driver.run(image.write(0, content))
    breaker.fault = None
    driver.run(image.write(0, content))
    driver.run(image.close())
