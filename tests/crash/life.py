"""A life on a host that fails: each operation of a sequence of actions in turn, once or for good; what must hold.

A request fails if an operation of its own does; reads go on; what was acknowledged is there, in this life and in the
next; after a failed sync no later one reports success; without a final failure the image goes on.
"""

import errno
from collections import Counter

from qcow2 import operation as op
from qcow2.driver.crash import CrashDriver, SimulatedFile
from qcow2.image import Image
from tests.crash.explorer import Violation
from tests.crash.fault import NEVER, Fault
from tests.crash.history import SECTOR, SIZE, History, size_sector
from tests.crash.images import open_image
from tests.crash.opening import look, open_state
from tests.crash.sequence import Beginning, Sort, beginning, fullness, steps_of
from tests.crash.walk import Judge
from tests.crash.workload import Action, Guest


class Life:
    """An image on which something fails, and its guest."""

    def __init__(self, sort: Sort, cache: str, sequence: tuple[str, ...], fault: Fault) -> None:
        self.begun: Beginning = beginning(sort, fullness(sequence))
        self.fault = fault
        self.file: SimulatedFile = self.begun.image.copy()
        self.driver = CrashDriver(1, fault=fault)
        self.writethrough = cache == "writethrough"
        self.steps = steps_of(sort, sequence)
        beyond = {**self.begun.beyond, SIZE: size_sector(sort.nsectors * SECTOR)}
        history = History(self.begun.contents, writethrough=self.writethrough, beyond=beyond)
        self.guest = Guest(self.driver, self._open(), history)

    def _open(self) -> Image:
        image: Image = self.driver.run(open_image(self.file, self.begun.backing, writethrough=self.writethrough))
        return image

    def work(self) -> bool:
        """All steps, the fault armed; false if a close among them failed, which ends this life."""
        self.fault.armed = True
        try:
            for step in self.steps:
                for action in step:
                    self.driver.spawn(self.guest.act(action))
                self.driver.finish()
                if step[0].kind == "reopen":
                    self.driver.run(self.guest.image.close())
                    self.guest.image = self._open()
        except OSError:
            return False
        finally:
            self.fault.armed = self.fault.for_good and self.fault.hit is not None
        return True

    def fails(self, action: Action) -> bool:
        before = len(self.guest.failures)
        self.driver.spawn(self.guest.act(action))
        self.driver.finish()
        return len(self.guest.failures) > before

    def require(self) -> None:
        """This life shows what was acknowledged, if it still can read; and so does the next."""
        judge = Judge(self.guest.history, self.driver.journal)
        now = len(self.driver.journal)
        judge.judge(open_state(self.file.after_kill(), self.begun.backing).seen, now, power=False)

    def require_reading(self) -> None:
        seen = self.driver.run(look(self.guest.image))
        Judge(self.guest.history, self.driver.journal).judge(seen, len(self.driver.journal), power=False)


def live(sort: Sort, cache: str, sequence: tuple[str, ...], fault: Fault) -> str:
    """Work under *fault*, and everything that must hold after; what became of the image."""
    life = Life(sort, cache, sequence, fault)
    if not life.work():
        life.require()
        return "a close failed"
    failures = len(life.guest.failures)
    fault.armed &= not isinstance(fault.hit, op.Read | op.ReadInto)
    life.require_reading()
    life.require()
    is_final = life.fails(Action("flush"))
    fault.armed = False  # the host is well again
    if is_final:
        assert life.fails(Action("flush")), "a later sync reports success"
    if isinstance(fault.hit, op.Sync):
        assert is_final, "a failed sync was hidden"
    if fault.code == errno.ENOSPC:
        assert not is_final, "a lack of space was final"
    assert life.fails(Action("write", 0, 1)) == is_final, "a write and a flush disagree on whether writes have ended"
    if not is_final and not fault.for_good:
        assert failures <= 1, f"{failures} requests failed by one fault"
    life.require_reading()
    life.require()
    try:
        life.driver.run(life.guest.image.close())
    except OSError:
        assert is_final, "a close failed that had no reason to"
    else:
        assert not is_final, "a close hides that writes have ended"
    life.require()
    if is_final:
        return "no more writes"
    return "requests failed" if failures else "nobody was hurt"


def live_with_every_fault(sort: Sort, cache: str, sequence: tuple[str, ...]) -> Counter[str]:
    """A life for each operation of *sequence* and each way in which it may fail; what became of them.

    Raises: Violation, naming the fault.
    """
    outcomes: Counter[str] = Counter()
    count = Fault(errno.EIO, NEVER, for_good=False)
    live(sort, cache, sequence, count)
    for at in range(1, count.seen + 1):
        for code, for_good in ((errno.EIO, False), (errno.EIO, True), (errno.ENOSPC, False), (errno.ENOSPC, True)):
            fault = Fault(code, at, for_good)
            try:
                outcome = live(sort, cache, sequence, fault)
            except (AssertionError, OSError) as error:
                where = f"{sort.name}/{cache}/{'+'.join(sequence)} operation {at} {errno.errorcode[code]}"
                raise Violation(f"{where} {for_good=} {type(fault.hit).__name__}: {error}") from error
            if fault.hit is not None:
                outcomes[outcome] += 1
    return outcomes
