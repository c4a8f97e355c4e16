"""A host without room that writes each page of a file elsewhere: what it refuses ends in the middle of a table."""

import errno
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest

from qcow2.driver.operation import Operation, Write
from qcow2.engine.image import Image
from qcow2.judge.check import check
from qcow2.judge.repair import repair
from qcow2.plane.l2cache import L2Cache
from tests.crash.driver import piece_bytes, simulated
from tests.crash.fault import Fault
from tests.engine import Bench, open_again, set_up

pytestmark = pytest.mark.pure

PAGE = 4096
SECTOR = 512
TABLE = SECTOR // 8 * SECTOR  # guest bytes that an L2 table maps
PAGE_OF_L1 = PAGE // 8 * TABLE  # guest bytes that a page of the L1 table maps
CHANGES: dict[str, Callable[[Image], Coroutine[Any, Any, object]]] = {
    "create": lambda image: image.create_snapshot("two", 0),
    "delete": lambda image: image.delete_snapshot("one"),
    "apply": lambda image: image.apply_snapshot("one"),
}


class FullHost:
    """Has room for *npages* pages, and then for none: of each write what lies in these gets through.

    It stays full, or is so for one write.
    """

    def __init__(self, npages: int, *, for_good: bool = True) -> None:
        self.left = npages
        self.has_refused = False
        self._for_good = for_good

    def __call__(self, operation: Operation) -> OSError | None:
        if not isinstance(operation, Write) or (self.has_refused and not self._for_good):
            return None
        content = b"".join(map(piece_bytes, operation.pieces))
        start = operation.host_offset
        npages = -(-(start + len(content)) // PAGE) - start // PAGE
        if npages <= self.left:
            self.left -= npages
            return None
        fits = max(0, (start // PAGE + self.left) * PAGE - start)
        simulated(operation.file).write(start, content[:fits])
        self.left = 0
        self.has_refused = True
        return OSError(errno.ENOSPC, "as told")


@pytest.mark.parametrize("npages", range(12))
@pytest.mark.parametrize("for_good", [True, False], ids=["full for good", "refuses once"])
def test_shrink_that_finds_no_room_loses_nothing_that_is_written_after_it(for_good: bool, npages: int) -> None:
    size, places = 4 * PAGE_OF_L1, [part * PAGE_OF_L1 + TABLE for part in range(4)]
    bench = set_up(size)
    for place in places:
        bench.write(place, b"a" * SECTOR)
    bench.driver.run(bench.image.flush())
    has_failed = False
    bench.breaker.fault = FullHost(npages, for_good=for_good)
    try:
        bench.driver.run(bench.image.shrink(TABLE))
    except OSError:
        has_failed = True
    bench.breaker.fault = None
    assert bench.driver.run(check(bench.file)).corruptions == 0
    bench.driver.run(bench.image.grow(size))
    for place in places[1:]:
        bench.write(place, b"b" * SECTOR)
    bench.driver.run(bench.image.flush())
    again = open_again(bench)
    assert [again.read(place, SECTOR) for place in places[1:]] == [b"b" * SECTOR] * 3
    bench.close()
    found = bench.driver.run(check(bench.file))
    assert found.corruptions == 0
    if has_failed and not for_good:  # no other write was refused: every reference could be taken back
        assert found.leaks == 0


def assert_sound_or_dirty(bench: Bench) -> None:
    found = bench.driver.run(check(bench.file))
    assert found.corruptions == 0 or found.is_dirty


@pytest.mark.parametrize("npages", range(40))
@pytest.mark.parametrize("for_good", [True, False], ids=["full for good", "refuses once"])
@pytest.mark.parametrize("what", CHANGES)
def test_snapshot_that_finds_no_room_leaves_nothing_wrong_that_the_dirty_bit_hides(
    what: str, for_good: bool, npages: int
) -> None:
    bench = set_up(2 * PAGE_OF_L1, refcount_order=6)
    places = [part * PAGE_OF_L1 // 10 + nth * SECTOR for nth in range(5) for part in range(20)]
    for place in places:  # what a table leads to is counted in other refcount blocks than the table
        bench.write(place, b"a" * SECTOR)
    if what != "create":
        bench.driver.run(bench.image.create_snapshot("one", 0))
        bench.write(places[0], b"a" * SECTOR)
    bench.breaker.fault = FullHost(npages, for_good=for_good)
    with suppress(OSError):
        bench.driver.run(CHANGES[what](bench.image))
    bench.breaker.fault = None
    assert_sound_or_dirty(bench)
    bench.close()
    assert_sound_or_dirty(bench)
    bench.driver.run(repair(bench.file))
    bench.assert_sound()
    again = open_again(bench, writable=True)
    assert [again.read(place, SECTOR) for place in places] == [b"a" * SECTOR] * len(places)


@pytest.mark.parametrize("at", range(1, 26))
@pytest.mark.parametrize("code", [errno.ECANCELED, errno.ENOSPC], ids=errno.errorcode.get)
@pytest.mark.parametrize("lazy", [False, True], ids=["accurate", "lazy"])
@pytest.mark.parametrize("what", CHANGES)
def test_snapshot_of_which_the_host_does_not_even_try_a_step_hides_no_leak(
    what: str, lazy: bool, code: int, at: int
) -> None:
    """What goes on after it would copy all that is counted too high."""
    bench = set_up(64 * SECTOR, lazy=lazy)
    bench.write(0, b"a" * 40 * SECTOR)
    if what != "create":
        bench.driver.run(bench.image.create_snapshot("one", 0))
        bench.write(0, b"b" * 10 * SECTOR)
    bench.breaker.fault = fault = Fault(code, at, is_untried=code == errno.ECANCELED)
    with fault.during(), suppress(OSError):
        bench.driver.run(CHANGES[what](bench.image))
    bench.breaker.fault = None
    with suppress(OSError):  # it takes no more writes
        bench.close()
    found = bench.driver.run(check(bench.file))
    assert (found.corruptions, found.leaks) == (0, 0) or found.is_dirty or bench.image.failure
    bench.driver.run(repair(bench.file))
    bench.assert_sound()


@pytest.mark.parametrize("nth", range(2))
@pytest.mark.parametrize("what", CHANGES)
def test_snapshot_whose_tables_find_no_room_takes_none(what: str, nth: int) -> None:
    bench = set_up(2 * PAGE_OF_L1)
    bench.write(0, b"a" * SECTOR)
    for name in ("one", "three"):
        bench.driver.run(bench.image.create_snapshot(name, 0))
    bench.driver.run(bench.image.flush())
    end, left = bench.file.size, nth

    def refuse_new(operation: Operation) -> OSError | None:
        nonlocal left
        if not isinstance(operation, Write) or operation.host_offset < end:
            return None
        left -= 1
        return OSError(errno.ENOSPC, "as told") if left < 0 else None

    bench.breaker.fault = refuse_new
    with suppress(OSError):
        bench.driver.run(CHANGES[what](bench.image))
    bench.breaker.fault = None
    bench.close()
    bench.assert_sound()


@pytest.mark.parametrize("npages", range(8))
def test_flags_come_back_below_a_table_that_a_full_host_left_counted_too_high(npages: int) -> None:
    bench = set_up(TABLE)
    bench.write(0, b"a" * 2 * SECTOR)
    bench.driver.run(bench.image.create_snapshot("one", 0))
    bench.breaker.fault = FullHost(npages)
    with suppress(OSError):
        bench.write(0, b"b" * SECTOR)
        bench.driver.run(bench.image.flush())
    bench.breaker.fault = None
    bench.driver.run(bench.image.apply_snapshot("one"))
    bench.driver.run(bench.image.delete_snapshot("one"))
    bench.close()
    found = bench.driver.run(check(bench.file))
    assert (found.corruptions, found.is_dirty) == (0, False)


def test_disk_goes_back_though_its_tables_find_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the header says so there is no way back: the cache keeps the memory that it has."""
    bench = set_up(64 * SECTOR)
    bench.write(0, b"a" * 40 * SECTOR)
    bench.driver.run(bench.image.create_snapshot("one", 0))
    before = bench.content()
    bench.write(0, b"b" * 10 * SECTOR)
    monkeypatch.setattr(L2Cache, "_slots", lambda cache: 1 << 31)  # a terabyte
    bench.driver.run(bench.image.apply_snapshot("one"))
    assert bench.content() == before
    bench.close()
    bench.assert_sound()
