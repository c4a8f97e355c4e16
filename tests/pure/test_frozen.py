"""The disk of a moment, kept while it changes: who waits for the target of a copy, and for how long."""

import errno
import os
import random
import tracemalloc
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from qcow2 import ImageError
from qcow2.driver.file import HostFile, go_on, outcome
from qcow2.driver.operation import Operation
from qcow2.driver.task import Scheduler, Task
from qcow2.engine.bitmaptable import PIECE, change_bits, count_bits
from qcow2.job.pace import Cancelled
from qcow2.job.reins import Reins
from qcow2.node.raw import RawImage
from vhost.frozen import CHUNK, MOST_BYTES, WINDOW, Frozen, Saved, Wanted

SIZE = MOST_BYTES + 4 * CHUNK + 512


class Copy:
    """A copy of a disk full of data, whose target takes what it is told to."""

    def __init__(self, file: HostFile, size: int = SIZE) -> None:
        self.saved: list[Saved] = []
        self.are_all_awaited = False
        self.frozen = Frozen(
            RawImage(file, size, read_only=True),
            Wanted(size, [(0, size - 2 * CHUNK)]),
            self.saved.append,
            lambda: self.are_all_awaited,
        )
        self.nanswered: int | None = None  # operations until one is held; None: all are answered
        self._held: list[tuple[Task, Operation]] = []
        self._scheduler = Scheduler(self._start)

    def _start(self, task: Task, operation: Operation) -> None:
        if self.nanswered == 0:
            self._held.append((task, operation))
            self.nanswered = None
            return
        if self.nanswered is not None:
            self.nanswered -= 1
        go_on(self._scheduler, task, *outcome(operation))

    def run(self, coroutine: Coroutine[Any, Any, None]) -> list[Task]:
        """Begin it; the list has its task once it has ended."""
        ended: list[Task] = []
        self._scheduler.spawn(coroutine, ended.append)
        self._scheduler.run()
        return ended

    def go_on(self) -> None:
        self._scheduler.run()

    def let_go(self) -> None:
        """Answer what is held."""
        self._start(*self._held.pop())
        self.go_on()


@pytest.fixture
def copy(tmp_path: Path) -> Iterator[Copy]:
    """What fills the memory for the target to the brim has been saved."""
    path = tmp_path / "disk"
    path.write_bytes(b"d" * SIZE)
    with HostFile.open(str(path)) as file:
        copy = Copy(file)
        (ended,) = copy.run(copy.frozen.save(0, MOST_BYTES))
        assert ended.take_error() is None
        assert sum(each.nbytes for each in copy.saved) == MOST_BYTES
        yield copy


def test_change_of_what_nobody_wants_waits_for_nobody(copy: Copy) -> None:
    assert copy.run(copy.frozen.save(0, CHUNK))
    assert copy.run(copy.frozen.save(SIZE - 512, 512))
    assert copy.run(copy.frozen.save(4 * SIZE, CHUNK))  # the disk has grown


def test_change_waits_for_the_target(copy: Copy) -> None:
    waiting = copy.run(copy.frozen.save(MOST_BYTES, 512))
    assert not waiting
    assert not copy.run(copy.frozen.save(MOST_BYTES, CHUNK))
    copy.frozen.taken(CHUNK)
    copy.go_on()
    assert waiting
    last = copy.saved[-1]
    assert last.guest_offset == MOST_BYTES
    assert bytes(last.data or b"") == b"d" * max(last.nbytes, CHUNK)  # and neighbours, where the disk was quick


def test_change_does_not_wait_for_a_target_that_has_failed(copy: Copy) -> None:
    waiting = copy.run(copy.frozen.save(MOST_BYTES, 512))
    copy.frozen.stop(OSError(errno.EIO, "gone"))
    copy.go_on()
    assert waiting[0].take_error() is None
    assert not any(copy.frozen.bits)
    (walked,) = copy.run(copy.frozen.walk(Reins()))
    assert "is lost: the guest wrote on" in str(walked.take_error())


def test_failure_of_what_may_not_be_done_again_ends_a_copy_that_has_made_room(copy: Copy) -> None:
    reins = Reins()
    walked = copy.run(copy.frozen.walk(reins))
    reins.cancel()
    copy.frozen.stop(ImageError("target", "No space left on device"))
    copy.frozen.look()
    copy.go_on()
    assert walked
    copy.frozen.try_again()
    copy.frozen.taken(MOST_BYTES)
    (again,) = copy.run(copy.frozen.walk(Reins()))
    assert str(again.take_error()) == "target: No space left on device"
    assert copy.run(copy.frozen.save(MOST_BYTES, CHUNK))


def test_failure_between_two_walks_is_told_by_the_second(copy: Copy) -> None:
    copy.frozen.try_again()
    copy.frozen.stop(OSError(errno.EIO, "gone"))
    (walked,) = copy.run(copy.frozen.walk(Reins()))
    assert isinstance(walked.take_error(), OSError)


def test_change_does_not_wait_for_a_walk_that_waits_for_the_target(copy: Copy) -> None:
    copy.frozen.taken(MOST_BYTES // 2)
    walked = copy.run(copy.frozen.walk(Reins()))
    assert copy.run(copy.frozen.save(MOST_BYTES, CHUNK))
    assert not walked


def test_walk_that_finds_no_room_any_more_hears_a_cancel(tmp_path: Path) -> None:
    path, size, reins = tmp_path / "disk", MOST_BYTES + (WINDOW + 4) * CHUNK, Reins()
    path.write_bytes(b"d" * size)
    with HostFile.open(str(path)) as file:
        copy = Copy(file, size)
        copy.nanswered = 1
        walked = copy.run(copy.frozen.walk(reins))  # up to where it asks what is in chunks that it has locked
        assert copy.run(copy.frozen.save(WINDOW * CHUNK, MOST_BYTES))
        copy.let_go()
        assert not walked
        reins.cancel()
        copy.frozen.look()
        copy.go_on()
        assert isinstance(walked[0].take_error(), Cancelled)
        waiting = copy.run(copy.frozen.save(0, CHUNK))
        copy.frozen.taken(WINDOW * CHUNK)
        copy.go_on()
        assert waiting
        assert copy.saved[-1].guest_offset == 0


def test_change_does_not_wait_where_all_requests_are_awaited(copy: Copy) -> None:
    reins = Reins()
    walked = copy.run(copy.frozen.walk(reins))
    waiting = copy.run(copy.frozen.save(MOST_BYTES, 512))
    assert not walked
    assert not waiting
    reins.cancel()
    copy.are_all_awaited = True
    copy.frozen.look()
    copy.go_on()
    assert waiting
    assert isinstance(walked[0].take_error(), Cancelled)
    assert copy.saved[-1].guest_offset == MOST_BYTES
    copy.frozen.taken(MOST_BYTES)
    again = copy.run(copy.frozen.walk(Reins()))
    copy.frozen.taken(CHUNK)  # of what was saved before
    copy.frozen.taken(2 * CHUNK)
    copy.go_on()
    assert again[0].take_error() is None
    assert sum(each.nbytes for each in copy.saved) == MOST_BYTES + 3 * CHUNK


def test_change_waits_where_a_walk_has_made_room_and_requests_go_on(copy: Copy) -> None:
    reins = Reins()
    copy.run(copy.frozen.walk(reins))
    reins.cancel()
    copy.frozen.look()
    copy.go_on()
    assert not copy.run(copy.frozen.save(MOST_BYTES, 512))


def test_copy_is_not_whole_before_its_target_has_taken_the_zeros_at_its_end(tmp_path: Path) -> None:
    """Else they are lost where something shows through them: a backing file, or what a device held."""
    path = tmp_path / "disk"
    path.write_bytes(b"d" * WINDOW * CHUNK)
    os.truncate(path, 3 * WINDOW * CHUNK)
    with HostFile.open(str(path)) as file:
        copy = Copy(file, 3 * WINDOW * CHUNK)
        walked = copy.run(copy.frozen.walk(Reins()))
        whole, zeros = copy.saved
        assert (whole.nbytes, zeros.nbytes, zeros.data) == (WINDOW * CHUNK, (2 * WINDOW - 2) * CHUNK, None)
        copy.frozen.taken(whole.nbytes)
        copy.go_on()
        assert not walked
        copy.frozen.taken(0)
        copy.go_on()
        assert walked[0].take_error() is None


@pytest.mark.parametrize("size", [CHUNK, 7 * CHUNK + 1, 8 * CHUNK, 100 * CHUNK - 512])
def test_bits_of_a_bitmap_are_the_chunks_that_are_wanted(size: int) -> None:
    bits = bytes(range(1, 256, 2))
    for given in (bits, bits[:1]):
        stretches = [(n * CHUNK, (n + 1) * CHUNK) for n in range(-(-size // CHUNK)) if n // 8 < len(given)]
        inside = [(start, end) for start, end in stretches if given[start // CHUNK // 8] >> start // CHUNK % 8 & 1]
        assert Wanted.of_bits(size, given).bits == Wanted(size, inside).bits


def test_wanted_chunks_are_found_and_counted() -> None:
    wanted = Wanted(100 * CHUNK + 1, [(CHUNK, CHUNK + 1), (30 * CHUNK, 41 * CHUNK), (100 * CHUNK, 200 * CHUNK)])
    found, chunk = [], 0
    while (chunk := wanted.next(chunk, wanted.end)) < wanted.end:
        end = wanted.run_end(chunk, wanted.end)
        found.append((chunk, end))
        chunk = end
    assert found == [(1, 2), (30, 41), (100, 101)]
    assert wanted.nbytes(100 * CHUNK + 1) == 12 * CHUNK + 1
    wanted.clear(0, 35)
    assert [wanted.next(0, end) for end in (35, 36, 200)] == [35, 35, 35]
    assert wanted.nbytes(100 * CHUNK + 1) == 6 * CHUNK + 1


def test_wanted_chunks_of_a_large_disk_take_little_more_than_their_bits() -> None:
    size = (1 << 40) + 1
    tracemalloc.start()
    try:
        wanted = Wanted(size, [(0, CHUNK), (3 * CHUNK, size)])
        assert wanted.nbytes(size) == size - 2 * CHUNK
        wanted.clear(5, wanted.end - 9)
        assert (wanted.nbytes(size), wanted.next(5, wanted.end)) == (3 * CHUNK + CHUNK + 1, wanted.end - 9)
        assert tracemalloc.get_traced_memory()[1] < 1.5 * len(wanted.bits)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("seed", range(20))
def test_bits_of_any_range_are_set_or_cleared(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.choice((8 * PIECE - 1, 24 * PIECE + 3, 40 * PIECE))
    bits, expected = bytearray(-(-count // 8)), bytearray(count)
    for number in range(8):
        first = draw.randrange(count)
        end = draw.randint(first, count)
        change_bits(bits, first, end, are_set=number % 2 == 0)
        expected[first:end] = bytes([1 - number % 2]) * (end - first)
    assert [bits[at // 8] >> at % 8 & 1 for at in range(count)] == list(expected)
    assert count_bits(bits) == expected.count(1)


@pytest.mark.parametrize("seed", range(20))
def test_runs_of_what_is_wanted_end_where_bits_do(seed: int) -> None:
    draw = random.Random(seed)
    runs = [(bool(number % 2), draw.choice((1, 3, 8, 9, 64, 300))) for number in range(12)]
    bits = [is_set for is_set, count in runs for _ in range(count)]
    wanted = Wanted(len(bits) * CHUNK, [])
    wanted.bits[:] = bytes(
        sum(bits[at + bit] << bit for bit in range(8) if at + bit < len(bits)) for at in range(0, len(bits), 8)
    )
    for first in range(len(bits)):
        for end in (len(bits), first + 1, min(first + 70, len(bits))):
            assert wanted.next(first, end) == next((at for at in range(first, end) if bits[at]), end)
            assert wanted.run_end(first, end) == next((at for at in range(first, end) if not bits[at]), end)
