"""Law 7 by enumeration: every operation of a workload fails once, and what the guest was told stays true.

A failing case is named by its kind, its seed and the number of the operation that failed: run the test again.
"""

import errno

import pytest

from qcow2.driver import operation as op
from tests.crash.driver import CrashDriver
from tests.crash.explorer import Violation
from tests.crash.fault import NEVER, Fault
from tests.crash.history import SECTOR, History
from tests.crash.images import APART, KINDS, check_image, open_image, read_all, start
from tests.crash.workload import Action, Guest, random_steps

pytestmark = pytest.mark.pure


class Life:
    """An image of a kind, opened, worked on while something may fail, and judged."""

    def __init__(self, kind: str, seed: int, fault: Fault) -> None:
        self.begun = start(kind)
        self.kind = (KINDS | APART)[kind]
        self.nsectors = self.kind.nsectors
        self.fault = fault
        self.file = self.begun.image.copy()
        self.data = None if self.begun.data is None else self.begun.data.copy()
        self.driver = CrashDriver(seed, fault=fault)
        image = self.driver.run(open_image(self.file, self.begun.backing, data=self.data))
        self.guest = Guest(self.driver, image, History(self.begun.contents))

    def work(self, seed: int) -> None:
        for step in random_steps(seed, self.nsectors, self.kind.cluster_sectors, steps=5, depth=4):
            for action in step:
                self.act(action)
            self.driver.finish()

    def act(self, action: Action) -> None:
        self.driver.spawn(self.guest.act(action))

    def fails(self, action: Action) -> bool:
        before = len(self.guest.failures)
        self.act(action)
        self.driver.finish()
        return len(self.guest.failures) > before

    def compare(self, content: bytes) -> None:
        for sector in range(self.nsectors):
            found = content[sector * SECTOR : (sector + 1) * SECTOR]
            if found not in self.guest.history.allowed(sector, len(self.driver.journal), power=False):
                raise Violation(f"sector {sector} holds {found[:16]!r}")

    def judge_next_life(self) -> None:
        """What another process makes of the file, as it is now."""
        driver, file = CrashDriver(), self.file.after_kill()
        data = None if self.data is None else self.data.after_kill()
        image = driver.run(open_image(file, self.begun.backing, data=data))
        driver.run(check_image(file))
        self.compare(content := driver.run(read_all(image)))
        if data is not None and self.kind.raw and not self.kind.encrypted:
            assert data.read(0, len(content)) == content, "the raw data file is another disk"
        driver.run(image.close())
        driver.run(check_image(file))


def live(kind: str, seed: int, fault: Fault) -> None:
    """Work, with a fault; then the guest reads everything, writes on or is refused, and the image is closed."""
    life = Life(kind, seed, fault)
    with fault.during():
        life.work(seed)
    life.compare(life.driver.run(read_all(life.guest.image)))
    is_final = life.fails(Action("flush"))
    if isinstance(fault.hit, op.Sync) and not fault.is_untried:
        assert is_final
    if fault.code == errno.ENOSPC:
        assert not is_final
    if fault.is_untried and is_final:  # but for the sync of a header that is written
        assert isinstance(fault.hit, op.Sync)
    assert life.fails(Action("write", 0, life.nsectors)) == is_final
    life.judge_next_life()
    if is_final:
        with pytest.raises(OSError):
            life.driver.run(life.guest.image.close())
    else:
        life.driver.run(life.guest.image.close())
    life.judge_next_life()


@pytest.mark.sample(15)
@pytest.mark.parametrize(
    ("code", "is_untried"),
    [(errno.EIO, False), (errno.ENOSPC, False), (errno.ENOMEM, True)],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("kind", [*KINDS, *APART])
def test_each_operation_of_a_workload_may_fail(kind: str, code: int, is_untried: bool) -> None:
    count = Fault(code, NEVER)
    live(kind, 1, count)
    for at in range(1, len(count.seen) + 1, 3):
        fault = Fault(code, at, is_untried=is_untried)
        try:
            live(kind, 1, fault)
        except (Violation, AssertionError, OSError) as error:
            raise AssertionError(f"operation {at}, {fault.hit}: {error}") from error


@pytest.mark.parametrize("kind", [*KINDS, *APART])
def test_each_operation_of_a_close_may_fail(kind: str) -> None:
    count = Life(kind, 2, Fault(errno.EIO, NEVER))
    count.work(2)
    with count.fault.during():
        count.driver.run(count.guest.image.close())
    for at in range(1, len(count.fault.seen) + 1):
        life = Life(kind, 2, Fault(errno.EIO, at))
        life.work(2)
        with life.fault.during(), pytest.raises(OSError):
            life.driver.run(life.guest.image.close())
        life.judge_next_life()
