"""A life on a host that fails: each operation of a sequence of actions in turn, once or for good; what must hold.

A request fails if an operation of its own does; reads go on; what was acknowledged is there, in this life and in the
next; after a failed sync no later one reports success; without a final failure the image goes on.
"""

import errno
import random
from collections import Counter
from dataclasses import dataclass, field

from qcow2.driver import operation as op
from qcow2.engine.image import Image
from tests.crash.driver import CrashDriver, SimulatedFile
from tests.crash.explorer import Violation
from tests.crash.fault import NEEDS_SPACE, NEVER, Fault
from tests.crash.history import SECTOR, SIZE, History, size_sector
from tests.crash.images import open_image
from tests.crash.opening import look
from tests.crash.sequence import Beginning, Sort, beginning, fullness, steps_of, with_neighbours
from tests.crash.variant import whole
from tests.crash.walk import Judge, Scene
from tests.crash.workload import Action, Guest


class Life:
    """An image on which something fails, and its guest; what becomes of it is opened in *scene*."""

    def __init__(
        self, sort: Sort, cache: str, sequence: tuple[str, ...], fault: Fault, scene: Scene, crowd: int | None = None
    ) -> None:
        """*crowd*, a seed: neighbours write into the same clusters, and operations complete at once."""
        self.begun: Beginning = beginning(sort, fullness(sequence))
        self.fault = fault
        self.scene = scene
        self.file: SimulatedFile = self.begun.image.copy()
        self.driver = CrashDriver(1 if crowd is None else crowd, fault=fault, at_once=crowd is not None)
        self.writethrough = cache == "writethrough"
        self.steps = steps_of(sort, sequence)
        if crowd is not None:
            draw = random.Random(crowd)
            self.steps = [with_neighbours(sort, step, draw) for step in self.steps]
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
        identity = hash((whole(self.file).identity(), bytes(self.file.memory.content)))
        opened = self.scene.open(identity, self.file.after_kill)
        judge.judge(opened.seen, len(self.driver.journal), power=False)

    def require_reading(self) -> None:
        seen = self.driver.run(look(self.guest.image))
        Judge(self.guest.history, self.driver.journal).judge(seen, len(self.driver.journal), power=False)


def live(
    sort: Sort, cache: str, sequence: tuple[str, ...], fault: Fault, scene: Scene, crowd: int | None = None
) -> str:
    """Work under *fault*, and everything that must hold after; what became of the image."""
    life = Life(sort, cache, sequence, fault, scene, crowd)
    if not life.work():
        life.require()
        return "a close failed"
    failures = len(life.guest.failures)
    fault.armed &= not isinstance(fault.hit, op.Read | op.ReadInto)
    life.require_reading()
    life.require()
    failed = life.fails(Action("flush"))
    fault.armed = False  # the host is well again
    is_final = life.fails(Action("flush"))
    if fault.code == errno.ENOSPC:
        assert not is_final, "a lack of space was final"
        assert fault.for_good or not failed, (
            "there is room, and a flush failed"
        )  # without any, links that wait do wait on
    else:
        assert failed == is_final, "a later sync reports success" if failed else "a flush hides that writes have ended"
    if isinstance(fault.hit, op.Sync):
        assert is_final, "a failed sync was hidden"
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


@dataclass
class Host:
    """Where the lives of one sort and cache mode are led: what they leave is opened once, *outcomes* counts them."""

    sort: Sort
    cache: str
    crowd: int | None = None
    outcomes: Counter[str] = field(default_factory=Counter)
    _scenes: dict[str, Scene] = field(default_factory=dict)  # by how full the image is

    def live_with_every_fault(self, sequence: tuple[str, ...], *, first: int = 1, stride: int = 1) -> None:
        """A life for every *stride*-th operation of *sequence* and each way in which it may fail.

        Raises: Violation, naming the fault.
        """
        backing = beginning(self.sort, fullness(sequence)).backing
        scene = self._scenes.setdefault(fullness(sequence), Scene(backing))
        count = Fault(errno.EIO, NEVER)
        live(self.sort, self.cache, sequence, count, scene, self.crowd)
        for at in range(first, len(count.seen) + 1, stride):
            for code in (errno.EIO, errno.ENOSPC) if count.seen[at - 1] in NEEDS_SPACE else (errno.EIO,):
                for for_good in (False, True):
                    spares_data = code == errno.ENOSPC and self.crowd is not None
                    self._live(sequence, Fault(code, at, for_good, spares_data), scene)

    def _live(self, sequence: tuple[str, ...], fault: Fault, scene: Scene) -> None:
        try:
            outcome = live(self.sort, self.cache, sequence, fault, scene, self.crowd)
            assert fault.hit is not None, "another run issues other operations"
        except (AssertionError, OSError) as error:
            crowd = "" if self.crowd is None else f"{self.crowd}/"
            what = f"{self.sort.name}/{self.cache}/{crowd}{'+'.join(sequence)} {fault}"
            raise Violation(f"{what}: {type(error).__name__}: {error}") from error
        self.outcomes[outcome] += 1
