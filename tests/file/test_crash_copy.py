"""Copies by enumeration: a death at any moment leaves no image, or the whole one; and nothing that others would see."""

import random
from collections.abc import Iterator

import pytest

from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.operation import Size
from qcow2.engine.create import Options, create
from qcow2.engine.image import Image
from qcow2.error import ImageError
from qcow2.job import newimage
from qcow2.job.copy import Manner, copy
from qcow2.job.newimage import NewImage
from qcow2.job.pace import Pace
from qcow2.job.source import Source
from qcow2.job.target import FIRST_BYTES, InPlace
from qcow2.node.raw import RawImage
from tests.crash.driver import CrashDriver, Effect, Point, SimulatedFile, points
from tests.engine import noise

SIZE = 200 << 9
MANNER = Manner(sparse_unit=512, width=3, window=4096)


def disk(seed: int, size: int = SIZE) -> bytes:
    """Some of its stretches are zeros."""
    draw = random.Random(seed)
    content = b""
    while len(content) < size:
        nbytes = draw.randrange(1, 20) << 9
        content += noise(nbytes, draw.randrange(1 << 30)) if draw.random() < 0.6 else bytes(nbytes)
    return content[:size]


def states(driver: CrashDriver, initial: SimulatedFile, file: SimulatedFile, seed: int) -> Iterator[SimulatedFile]:
    """What a kill or a power loss leaves, at each moment."""
    draw = random.Random(seed)
    for point in points(driver.journal, initial, file):
        yield point.after_kill()
        yield point.keep(())
        for _ in range(12):
            yield point.keep(_some(point, draw))


def _some(point: Point, draw: random.Random) -> list[Effect]:
    pieces = [torn for _, effect in point.pending for torn in effect.tear()]
    return [piece for piece in pieces if draw.random() < 0.5]


def content_of(file: SimulatedFile, base: bytes | None) -> bytes | None:
    """What a reader finds; None if it is no image."""
    driver = CrashDriver()
    below = None if base is None else driver.run(RawImage.open(SimulatedFile.parse("base", base)))
    try:
        image = driver.run(Image.open(file.copy(), backing=below))
    except ImageError:
        return None
    target = bytearray(image.size)
    driver.run(image.read(0, MemoryBuffer(memoryview(target))))
    return bytes(target)


def copied_to_new_image(
    seed: int, *, version: int = 3, base: bytes | None = None
) -> tuple[CrashDriver, SimulatedFile, SimulatedFile]:
    """The driver, the file before, and after; there was an image in it."""
    driver = CrashDriver(seed)
    file = SimulatedFile("disk", {}, 0)
    driver.run(create(file, Options(size=SIZE, cluster_bits=9)))
    initial, driver = file.copy(), CrashDriver(seed)
    source = driver.run(RawImage.open(SimulatedFile.parse("source", disk(seed))))
    below = None if base is None else driver.run(RawImage.open(SimulatedFile.parse("base", base)))
    name, image_format = ("base", "raw") if base is not None else (None, None)
    options = Options(size=SIZE, cluster_bits=9, version=version, backing_name=name, backing_format=image_format)
    driver.run(copy(Source.of(source), NewImage(file, options, below), Pace(), MANNER, below))
    return driver, initial, file


BASES = {"": None, "base": disk(77, 150 << 9)}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize(("version", "seed"), [(3, 1), (3, 2), (2, 3)])
def test_new_image_is_whole_or_none(version: int, seed: int, base: bytes | None) -> None:
    driver, initial, file = copied_to_new_image(seed, version=version, base=base)
    assert content_of(file, base) == disk(seed)
    seen = [content_of(state, base) for state in states(driver, initial, file, seed)]
    assert len(seen) > 300
    assert {None, disk(seed)} <= {*seen} <= {None, disk(seed), content_of(initial, base)}
    assert content_of(initial, base) not in seen[70:]


def test_the_explorer_objects_to_a_header_before_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newimage, "Sync", Size)
    driver, initial, file = copied_to_new_image(1)
    seen = []
    for state in states(driver, initial, file, 1):
        try:
            seen.append(content_of(state, None))
        except ImageError:
            seen.append(b"corrupt")
    assert not {*seen} <= {None, disk(1), bytes(SIZE)}


@pytest.mark.parametrize("seed", [4, 5])
def test_raw_target_has_its_first_bytes_when_it_has_all(seed: int) -> None:
    driver = CrashDriver(seed)
    source = driver.run(RawImage.open(SimulatedFile.parse("source", disk(seed))))
    file = SimulatedFile.parse("disk", noise(SIZE, 6))
    initial, driver = file.copy(), CrashDriver(seed)
    target = driver.run(RawImage.open(file, writable=True))
    driver.run(copy(Source.of(source), InPlace(target, SIZE, is_zero=False), Pace(), MANNER))
    assert file.content() == disk(seed)
    is_begun = False
    for state in states(driver, initial, file, seed):
        content = state.content()
        if content[FIRST_BYTES:] != initial.content()[FIRST_BYTES:] and content != disk(seed):
            is_begun = True
            assert content[:512] == bytes(512) or content[FIRST_BYTES:] == disk(seed)[FIRST_BYTES:]
    assert is_begun
