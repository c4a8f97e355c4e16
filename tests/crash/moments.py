"""What a kill or a power loss leaves at each moment of a job: for tests that look at whole disks."""

import random
from collections.abc import Iterator

from tests.crash.driver import CrashDriver, Effect, Point, SimulatedFile, points

Snapshot = tuple[int, list[SimulatedFile]]  # entries of the journal that had happened, states that may be found


def moments(
    driver: CrashDriver, initial: SimulatedFile, file: SimulatedFile, draw: random.Random, samples: int
) -> Iterator[Snapshot]:
    """After each operation: a kill, a power loss that keeps nothing, some that keep a part."""
    for point in points(driver.journal, initial, file):
        partly = [point.keep(_some(point, draw)) for _ in range(samples)]
        yield point.position, [point.after_kill(), point.keep(()), *partly]


def _some(point: Point, draw: random.Random) -> list[Effect]:
    pieces = [torn for _, effect in point.pending for torn in effect.tear()]
    return [piece for piece in pieces if draw.random() < 0.5]


def states(
    driver: CrashDriver, initial: SimulatedFile, file: SimulatedFile, seed: int, *, samples: int = 6
) -> Iterator[SimulatedFile]:
    """Of one file, moment after moment."""
    for _, found in moments(driver, initial, file, random.Random(seed), samples):
        yield from found


def states_together(
    driver: CrashDriver, files: list[tuple[SimulatedFile, SimulatedFile]], seed: int, *, samples: int = 3
) -> Iterator[list[SimulatedFile]]:
    """Of several files of one host, given as (initially, at the end): what each may be at one moment."""
    draw = random.Random(seed)
    now = [[initial.copy()] for initial, _ in files]
    found = [
        (position, index, snapshot)
        for index, (initial, file) in enumerate(files)
        for position, snapshot in moments(driver, initial, file, draw, samples)
    ]
    for _, index, snapshot in sorted(found, key=lambda each: each[:2]):
        now[index] = snapshot
        yield [each[0].copy() for each in now]  # killed: each has all
        for _ in range(samples):
            yield [draw.choice(each[1:] or each).copy() for each in now]
