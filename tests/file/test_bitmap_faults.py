"""Law 11 on a host that fails: each operation of a workload fails once, and no bitmap says too little then."""

import errno
import itertools
from contextlib import suppress
from typing import Any

import pytest

from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.operation import Operation, Read, ReadInto, Store, Sync, Write
from qcow2.engine.bitmapplan import BitmapPlan
from qcow2.error import ImageError
from qcow2.plane.linklog import LIMIT
from tests.crash.bitmaps import NAMES, bitmap_opener
from tests.crash.driver import CrashDriver, SimulatedFile
from tests.crash.history import SECTOR, History
from tests.crash.images import open_image, start
from tests.crash.workload import Action, Guest

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
