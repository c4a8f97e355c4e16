"""Running a workload on a simulated host, and opening what a death left of it."""

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from qcow2.engine.image import Image
from qcow2.error import ImageError
from tests.crash.driver import CrashDriver, SimulatedFile
from tests.crash.explorer import Run, Violation
from tests.crash.history import History
from tests.crash.images import check_image, open_image, read_all, start
from tests.crash.workload import Guest, Step
from tests.extents import Plane, Served


def perform(kind: str, steps: Sequence[Step], *, seed: int, writethrough: bool, at_once: bool = False) -> Run:
    """Run *steps* on an image of *kind*: the actions of a step side by side, completing in the seed's order.

    *at_once*: what the extent map can do alone it does.
    """
    begun = start(kind)
    file = begun.image.copy()
    initial = file.copy()
    driver = CrashDriver(seed)
    image = driver.run(open_image(file, begun.backing, writethrough=writethrough))
    if at_once:
        plane = Plane(driver, image, file, begun.backing)
        plane.syncs = writethrough
        image = Served(image, plane)
    guest = Guest(driver, image, History(begun.contents, writethrough=writethrough))
    for step in steps:
        for action in step:
            driver.spawn(guest.act(action))
        driver.finish()
        if any(action.kind == "reopen" for action in step):
            driver.run(guest.image.close())
            guest.image = driver.run(open_image(file, begun.backing, writethrough=writethrough))
    driver.run(guest.image.close())
    name = f"{kind} seed={seed} {'writethrough' if writethrough else 'writeback'} {describe(steps)}"
    return Run(name, initial, file, driver.journal, guest.history)


def describe(steps: Sequence[Step]) -> str:
    """The workload in one line."""
    return " ; ".join(" & ".join(map(str, step)) for step in steps)


def opener(
    kind: str, look: Callable[[Image], Coroutine[Any, Any, bytes]] = read_all
) -> Callable[[SimulatedFile], bytes]:
    """Opens states of an image of *kind* as the daemon would, judges the metadata, and answers what *look* sees."""
    begun = start(kind)
    return lambda file: open_state(file, begun.backing, look)


def open_state(
    file: SimulatedFile,
    backing: SimulatedFile | None,
    look: Callable[[Image], Coroutine[Any, Any, bytes]],
) -> bytes:
    """Open what a death left as the daemon would, judge the metadata, and answer what *look* sees."""
    driver = CrashDriver()
    try:
        image = driver.run(open_image(file, backing))
        driver.run(check_image(file))
        seen = driver.run(look(image))
        driver.run(image.close())
        driver.run(check_image(file))
    except (ImageError, OSError, ValueError, LookupError, ArithmeticError) as error:
        raise Violation(f"{type(error).__name__}: {error}") from error
    return bytes(seen)
