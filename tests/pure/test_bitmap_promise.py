"""Law 11 at a death: while the image says that its bitmaps are valid, its disk is as it was when they were.

The census before the first change syncs as well: one of the two syncs alone can go and nothing here is red.
"""

import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from qcow2.driver.buffer import MemoryBuffer
from qcow2.engine.image import Image
from qcow2.engine.opened import OpenOptions
from qcow2.format import layout
from qcow2.node.raw import RawImage
from tests.crash.driver import CrashDriver, SimulatedFile, points
from tests.engine import Bench, noise, read, set_up

pytestmark = pytest.mark.pure

CLUSTER = 4096
SIZE = 16 * CLUSTER
BITMAPS_VALID = layout.HEADER_AUTOCLEAR_OFFSET + 7

CHANGES: dict[str, Callable[[Image], Coroutine[Any, Any, Any]]] = {
    "in place": lambda image: image.write(100, MemoryBuffer(memoryview(noise(3000)))),
    "new cluster": lambda image: image.write(5 * CLUSTER, MemoryBuffer(memoryview(noise(CLUSTER)))),
    "part of a new cluster": lambda image: image.write(5 * CLUSTER + 512, MemoryBuffer(memoryview(noise(512)))),
    "zeroes": lambda image: image.write_zeroes(0, 2 * CLUSTER, unmap=True),
    "zeroes in place": lambda image: image.write_zeroes(0, 2 * CLUSTER, unmap=False),
    "discard": lambda image: image.discard(0, 2 * CLUSTER),
    "grow": lambda image: image.grow(SIZE + 8 * CLUSTER),
}


def content(file: SimulatedFile, base: SimulatedFile | None) -> bytes:
    """What a reader finds that knows no link log."""
    driver = CrashDriver()
    backing = driver.run(RawImage.open(base)) if base else None
    image = driver.run(Image.open(file.copy(), backing=backing))
    return read(driver, image, 0, image.size)


def opened_with_valid_bitmaps(*, base: bytes | None, lazy: bool) -> tuple[Bench, CrashDriver]:
    bench = set_up(SIZE, cluster_bits=12, base=base, lazy=lazy)
    bench.write(0, noise(2 * CLUSTER, 7))
    bench.close()
    bench.file.write(BITMAPS_VALID, b"\1")
    driver = CrashDriver()
    backing = driver.run(RawImage.open(bench.base)) if bench.base else None
    bench.image = driver.run(Image.open(bench.file, backing=backing, options=OpenOptions(writable=True)))
    return bench, driver


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("base", [None, noise(SIZE, 3)])
@pytest.mark.parametrize("change", CHANGES)
def test_bitmaps_that_are_valid_after_a_death_are_right(change: str, base: bytes | None, lazy: bool) -> None:
    bench, driver = opened_with_valid_bitmaps(base=base, lazy=lazy)
    before, initial = content(bench.file, bench.base), bench.file.copy()
    start = len(driver.journal)
    driver.run(CHANGES[change](bench.image))
    driver.run(bench.image.flush())
    valid = 0
    rng = random.Random(change)
    for point in points(driver.journal[start:], initial, bench.file):
        parts = [part for _, effect in point.pending for part in effect.tear()]
        kept = [point.keep(part for part in parts if rng.random() < share) for share in (0.2, 0.5, 0.8)]
        for state in (point.after_kill(), *kept):
            if state.read(BITMAPS_VALID, 1) == b"\1":
                valid += 1
                assert content(state, bench.base) == before
    assert valid  # deaths before the first change are among them
    assert bench.file.read(BITMAPS_VALID, 1) == b"\0"
