"""Refcount blocks and their table when the host has no room."""

import errno
import itertools
from contextlib import suppress

import pytest

from qcow2.driver.operation import Operation, Read, Write
from qcow2.engine import refcount
from qcow2.format.header import read_header
from qcow2.judge.check import check
from qcow2.judge.repair import repair
from tests.engine import Bench, noise, open_again, set_up

pytestmark = pytest.mark.pure

CLUSTER = 512
PER_BLOCK = 64  # clusters: these images have counts of 64 bits


class Full:
    """Fails the write number *number* for want of space."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.seen = 0

    def __call__(self, operation: Operation) -> OSError | None:
        self.seen += isinstance(operation, Write)
        return OSError(errno.ENOSPC, "full") if isinstance(operation, Write) and self.seen == self.number else None


def written(nbytes: int, *, lazy: bool = False) -> Bench:
    bench = set_up(nbytes, refcount_order=6, lazy=lazy)
    bench.write(0, noise(nbytes))
    bench.close()
    return open_again(bench, writable=True)


def test_shrink_without_room_for_a_table_entry_is_gone_on_from() -> None:
    size, rest = 256 * CLUSTER, 8 * CLUSTER
    for number in itertools.count(1):
        bench, fault = written(size), Full(number)
        bench.breaker.fault = fault
        with suppress(OSError):
            bench.driver.run(bench.image.shrink(rest))
        bench.breaker.fault = None
        if fault.seen < number:
            break
        if bench.image.size == size:
            continue
        bench.driver.run(bench.image.grow(size))
        bench.write(rest, noise(size - rest, 2))
        assert bench.content() == noise(size)[:rest] + noise(size - rest, 2)
        bench.close()
        assert not bench.driver.run(check(bench.file)).corruptions
    assert number > 4


def test_each_block_is_owned_though_another_one_found_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four blocks are kept in memory: a new one needs the room of another, which has changed."""
    monkeypatch.setattr(refcount, "CACHE_BYTES", 0)
    size = 12 * PER_BLOCK * CLUSTER
    for number in itertools.count(1):
        bench, fault = set_up(size, refcount_order=6, lazy=True), Full(number)
        bench.breaker.fault = fault
        for start in range(0, size, 32 * CLUSTER):
            with suppress(OSError):
                bench.write(start, noise(32 * CLUSTER, start))
        bench.breaker.fault = None
        assert bench.image._changes is not None
        for offset in filter(None, bench.image._changes.snapshots._refcounts.table):
            assert bench.image._mapping.is_metadata(offset // CLUSTER), f"write {number}: {offset:#x}"
        bench.close()
        bench.assert_sound()
        if fault.seen < number:
            break
    assert number > 40


@pytest.mark.parametrize("nclusters", [4, 6])
def test_table_grows_as_far_as_its_limit(nclusters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refcount, "MAX_REFCOUNT_TABLE_BYTES", nclusters * CLUSTER)
    piece = PER_BLOCK * CLUSTER
    counted = nclusters * CLUSTER // 8 * piece  # bytes of the file, at most
    bench, end = set_up(counted, refcount_order=6), 0
    with suppress(OSError):
        while end < counted:
            bench.write(end, noise(piece, end))
            end += piece
    assert end > counted * 15 // 16
    bench.close()
    bench.assert_sound()


def test_counts_that_could_not_be_lowered_again_are_left_to_a_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sixth block finds no room when counts rise, and the first, written and forgotten, cannot be read again."""
    monkeypatch.setattr(refcount, "CACHE_BYTES", 0)
    bench = set_up(12 * PER_BLOCK * CLUSTER, refcount_order=6)
    bench.write(0, noise(8 * PER_BLOCK * CLUSTER))
    bench.driver.run(bench.image.flush())
    table = bench.image._changes.snapshots._refcounts.table
    blocks = list(filter(None, table))
    assert len(blocks) > 8
    failures = [
        (Write, range(blocks[5], blocks[5] + CLUSTER), OSError(errno.ENOSPC, "full")),
        (Read, range(blocks[0], blocks[0] + 1), OSError(errno.EIO, "as told")),
    ]

    def fault(operation: Operation) -> OSError | None:
        kind, where, error = failures[0] if failures else (Write, range(0), None)
        if not isinstance(operation, kind) or operation.host_offset not in where:
            return None
        del failures[0]
        return error

    bench.breaker.fault = fault
    with pytest.raises(OSError, match="as told"):
        bench.driver.run(bench.image.create_snapshot("s", 0))
    assert not failures
    bench.write(0, noise(CLUSTER, 2))
    content = bench.content()
    bench.close()
    report = bench.driver.run(check(bench.file))
    assert (report.corruptions, bool(report.leaks)) == (0, True)
    assert bench.driver.run(read_header(bench.file)).is_dirty
    bench.driver.run(repair(bench.file))
    bench.assert_sound()
    assert bench.reopened_content() == content
