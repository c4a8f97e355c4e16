"""A bitmap frozen for who copies what it reports: what goes when that is done, and what stays."""

import errno
import itertools
import random
from typing import Any

import pytest

from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.operation import Operation, Read, Size
from qcow2.engine.image import Image
from qcow2.error import BitmapError
from tests.bitmapreader import read_bitmaps
from tests.crash.driver import CrashDriver, SimulatedFile, points
from tests.crash.explorer import subsets
from tests.crash.images import check_image, open_image, read_all, start
from tests.engine import Bench, Breaker, set_up

SECTOR = 512
FIRST, SINCE, LATER = {3, 4, 40}, {4, 5, 60}, {7}


def write(driver: CrashDriver, image: Image, sectors: set[int]) -> None:
    for sector in sectors:
        driver.run(image.write(sector * SECTOR, MemoryBuffer(memoryview(b"x" * SECTOR))))


def fine(file: SimulatedFile) -> frozenset[int]:
    """The sectors that the bitmap of single ones has in *file*, which is opened as after that death, and sound."""
    return said(opened(file))


def opened(file: SimulatedFile) -> SimulatedFile:
    driver = CrashDriver()
    driver.run(open_image(file, None))
    driver.run(check_image(file))
    return file


def said(file: SimulatedFile) -> frozenset[int]:
    bitmap = read_bitmaps(file.read)["fine"]
    assert bitmap.is_valid
    return bitmap.dirty


@pytest.mark.parametrize("is_copied", [False, True])
@pytest.mark.parametrize("kind", ["bitmaps", "bitmaps-lazy"])
def test_no_death_forgets_what_is_not_copied(kind: str, is_copied: bool) -> None:
    begun = start(kind)
    file, driver = begun.image.copy(), CrashDriver(1)
    image = driver.run(open_image(file, begun.backing))
    old = said(file)
    write(driver, image, FIRST)
    driver.run(image.settle())
    driver.run(image.flush())
    initial, first = file.copy(), len(driver.journal)
    frozen = driver.run(image.freeze_bitmap("fine"))
    assert bits_of(frozen.bits) == old | FIRST
    write(driver, image, SINCE)
    asked = len(driver.journal) - first
    driver.run(image.thaw_bitmap(frozen, is_copied=is_copied))
    thawed = len(driver.journal) - first
    write(driver, image, LATER)
    draw, all_before, only_since = random.Random(0), old | FIRST | SINCE, frozenset(SINCE)
    states = 0
    for point in points(driver.journal[first:], initial, file):
        parts = [((n, i), part) for n, effect in point.pending for i, part in enumerate(effect.tear())]
        kill, powers = point.after_kill(), [point.keep(e for _, e in some) for some in subsets(parts, 6, draw)]
        found = fine(kill)
        assert found >= old | FIRST or (is_copied and point.position > asked)
        for state in powers:
            states += 1
            reported = said(state)
            assert reported >= old | FIRST or (is_copied and point.position > asked and reported >= only_since)
            opened(state)
        if point.position > thawed:
            kept = only_since if is_copied else all_before
            assert kept <= found <= kept | LATER
        elif point.position > asked:
            assert found in (all_before, only_since)
    assert states > 10
    driver.run(image.close())
    assert said(file) == (only_since if is_copied else all_before) | LATER


def bits_of(bits: bytes) -> set[int]:
    return {bit for bit in range(len(bits) * 8) if bits[bit >> 3] >> (bit & 7) & 1}


SIZE = 1 << 20


@pytest.fixture
def bench() -> Bench:
    bench = set_up(SIZE, cluster_bits=12, log_capacity=64)
    bench.driver.run(bench.image.change_bitmaps(lambda plan: plan.add("kept", SECTOR, enabled=True)))
    return bench


def dirty(bench: Bench, name: str = "kept") -> set[int]:
    (stored,) = (each for each in bench.driver.run(bench.image.bitmaps()) if each.bitmap.name == name)
    return bits_of(bench.driver.run(bench.image.bitmap_bits(stored)))


@pytest.mark.parametrize("between", ["settle", "grow", "shrink", "other bitmaps", "another freeze"])
def test_what_comes_between_changes_nothing(bench: Bench, between: str) -> None:
    image, run = bench.image, bench.driver.run
    bench.write(0, b"a" * 512)
    frozen, wanted = run(image.freeze_bitmap("kept")), {2, 9}
    bench.write(1024, b"b" * 512)
    match between:
        case "settle":
            run(image.settle())
        case "grow":
            run(image.grow(SIZE + 4096))
            wanted |= {*range(SIZE // 512, SIZE // 512 + 8)}
        case "shrink":
            run(image.shrink(SIZE // 2 + 512))
        case "other bitmaps":
            run(image.change_bitmaps(lambda plan: plan.add("other", 4096, enabled=True)))
        case _:
            run(image.change_bitmaps(lambda plan: plan.add("other", 4096, enabled=True)))
            other = run(image.freeze_bitmap("other"))
            bench.write(4096, b"d" * 512)
            run(image.thaw_bitmap(other, is_copied=True))
            wanted |= {8}
            assert dirty(bench, "other") == {1}
    bench.write(9 * 512, b"c" * 512)
    run(image.thaw_bitmap(frozen, is_copied=True))
    assert dirty(bench) == wanted
    bench.close()
    assert said_by(bench) == wanted


def said_by(bench: Bench) -> frozenset[int]:
    return read_bitmaps(bench.file.read)["kept"].dirty


def test_a_disabled_one_reports_nothing_more_once_it_is_copied(bench: Bench) -> None:
    bench.write(0, b"a" * 512)
    bench.driver.run(bench.image.change_bitmaps(lambda plan: plan.enable("kept", on=False)))
    frozen = bench.driver.run(bench.image.freeze_bitmap("kept"))
    bench.write(512, b"a" * 512)
    bench.driver.run(bench.image.thaw_bitmap(frozen, is_copied=True))
    assert dirty(bench) == set()


CHANGES: dict[str, Any] = {
    "remove": lambda plan: plan.remove("kept"),
    "clear": lambda plan: plan.clear("kept"),
    "disable": lambda plan: plan.enable("kept", on=False),
    "merge": lambda plan: plan.merge_own("kept", "kept"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_frozen_one_is_left_alone(bench: Bench, what: str) -> None:
    frozen = bench.driver.run(bench.image.freeze_bitmap("kept"))
    with pytest.raises(BitmapError, match="'kept' is currently in use"):
        bench.driver.run(bench.image.change_bitmaps(CHANGES[what]))
    with pytest.raises(BitmapError, match="'kept' is currently in use"):
        bench.driver.run(bench.image.freeze_bitmap("kept"))
    bench.driver.run(bench.image.thaw_bitmap(frozen, is_copied=False))
    bench.driver.run(bench.image.change_bitmaps(CHANGES[what]))
    with pytest.raises(BitmapError, match="not frozen any more"):
        bench.driver.run(bench.image.thaw_bitmap(frozen, is_copied=True))


@pytest.mark.parametrize("what", ["clear", "copied"])
def test_what_a_bitmap_forgets_is_stable(what: str) -> None:
    """Or a power loss brought back an older disk, and no bit said so."""
    begun = start("bitmaps")
    file, driver = begun.image.copy(), CrashDriver(2)
    image = driver.run(open_image(file, begun.backing))
    driver.run(image.settle())
    driver.run(image.flush())
    initial, first = file.copy(), len(driver.journal)
    write(driver, image, {3})
    written = len(driver.journal) - first
    if what == "clear":
        driver.run(image.change_bitmaps(lambda plan: plan.clear("fine")))
    else:
        driver.run(image.thaw_bitmap(driver.run(image.freeze_bitmap("fine")), is_copied=True))
    draw, forgotten = random.Random(1), 0
    for point in points(driver.journal[first:], initial, file):
        parts = [((n, i), part) for n, effect in point.pending for i, part in enumerate(effect.tear())]
        for some in subsets(parts, 6, draw) if point.position > written else ():
            state = point.keep(effect for _, effect in some)
            if 3 not in said(state):
                forgotten += 1
                after = CrashDriver()
                content = after.run(read_all(after.run(open_image(state, None))))
                assert content[3 * SECTOR : 4 * SECTOR] == b"x" * SECTOR
    assert forgotten


@pytest.mark.parametrize("what", ["clear", "copied"])
def test_what_a_bitmap_has_forgotten_is_not_told_as_failed(what: str) -> None:
    """Who reads it again to record in it may fail; a copy that is thrown away because of that is nobody's any more."""
    for number in itertools.count(1):
        begun, seen, breaker = start("bitmaps"), 0, Breaker()
        file, driver = begun.image.copy(), CrashDriver(2, fault=breaker)
        image = driver.run(open_image(file, begun.backing))
        write(driver, image, FIRST)
        before = dirty(Bench(driver, breaker, file, None, image), "fine")

        def fault(operation: Operation, number: int = number) -> OSError | None:
            nonlocal seen
            seen += isinstance(operation, Read | Size)
            return OSError(errno.EIO, "as told") if isinstance(operation, Read | Size) and seen == number else None

        frozen = driver.run(image.freeze_bitmap("fine"))
        if what == "clear":
            driver.run(image.thaw_bitmap(frozen, is_copied=False))
        breaker.fault, is_told = fault, True
        try:
            if what == "clear":
                driver.run(image.change_bitmaps(lambda plan: plan.clear("fine")))
            else:
                driver.run(image.thaw_bitmap(frozen, is_copied=True))
        except OSError:
            is_told = False
        breaker.fault = None
        assert said(file) == (set() if is_told else before), f"read {number}"
        if seen < number:
            break
        if is_told:
            with pytest.raises(OSError, match="no more writes"):
                write(driver, image, LATER)
    assert number > 6
