"""The engine's operations on the worker: complete or failed, never short, and honest about what is in flight."""

import errno
import mmap
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ring.host import Host
from ring.request import Request
from ring.worker import Worker
from tests.blockguest import IN, MIB, OK, OUT, UNTOUCHED, Guest, open_pipe
from tests.patience import TIMEOUT
from virtio.native import NativeBlock


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(MIB))
    return path


@pytest.fixture
def guest(path: Path) -> Iterator[Guest]:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    with Guest(fd) as guest:
        yield guest
    os.close(fd)


def wait_for(guest: Guest, begin: Callable[[Callable[[int], None]], None]) -> int:
    """Run *begin(done)* on the worker thread and wait for the result."""
    results: list[int] = []
    done = threading.Event()

    def finish(result: int) -> None:
        results.append(result)
        done.set()

    guest.worker.call(lambda: begin(finish))
    assert done.wait(TIMEOUT)
    return results[0]


def test_read_fills_all_pieces(guest: Guest, path: Path) -> None:
    pieces = [bytearray(nbytes) for nbytes in (1, 4096, 0, 511)]
    assert wait_for(guest, lambda done: guest.worker.read(guest.slot, 1000, pieces, done)) == 0
    assert b"".join(pieces) == path.read_bytes()[1000:5608]


def test_write_takes_all_pieces(guest: Guest, path: Path) -> None:
    pieces = [b"one", bytearray(b"two"), memoryview(b"three"), b""]
    assert wait_for(guest, lambda done: guest.worker.write(guest.slot, 77, pieces, done)) == 0
    assert path.read_bytes()[77:88] == b"onetwothree"


def test_thousands_of_pieces_are_one_read(guest: Guest, path: Path) -> None:
    pieces = [bytearray(3) for _ in range(5000)]
    assert wait_for(guest, lambda done: guest.worker.read(guest.slot, 0, pieces, done)) == 0
    assert b"".join(pieces) == path.read_bytes()[:15000]


def test_read_past_the_end_gives_zeros(guest: Guest, path: Path) -> None:
    pieces = [bytearray(b"\xff" * 100), bytearray(b"\xff" * 100)]
    assert wait_for(guest, lambda done: guest.worker.read(guest.slot, MIB - 50, pieces, done)) == 0
    assert b"".join(pieces) == path.read_bytes()[-50:] + bytes(150)


def test_transfer_of_nothing_succeeds(guest: Guest) -> None:
    assert wait_for(guest, lambda done: guest.worker.read(guest.slot, 0, [], done)) == 0
    assert wait_for(guest, lambda done: guest.worker.write(guest.slot, 0, [b""], done)) == 0


def test_read_only_piece_cannot_be_filled(guest: Guest) -> None:
    with pytest.raises(BufferError):
        guest.worker.call(lambda: guest.worker.read(guest.slot, 0, [b"const"], lambda result: None))


def test_unknown_slot_is_refused(guest: Guest) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        guest.worker.call(lambda: guest.worker.read(guest.slot + 1, 0, [bytearray(1)], lambda result: None))


def test_short_reads_are_continued() -> None:
    source, feed = open_pipe()
    with source, Guest(source.fileno()) as guest, feed:
        target = bytearray(9)
        results: list[int] = []
        done = threading.Event()

        def finish(result: int) -> None:
            results.append(result)
            done.set()

        guest.worker.call(lambda: guest.worker.read(guest.slot, 0, [memoryview(target)[:4], target], finish))
        for part in (b"abc", b"def", b"ghi", b"jklm"):
            feed.write(part)
        assert done.wait(TIMEOUT)
    assert results == [0]
    assert bytes(target) == b"efghijklm"


def test_short_write_is_continued_and_its_failure_reported(guest: Guest, path: Path) -> None:
    limit = MIB + 100
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        result = wait_for(guest, lambda done: guest.worker.write(guest.slot, MIB, [bytes(200)], done))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result == -errno.EFBIG
    assert path.stat().st_size == limit


def test_failed_write_of_the_fast_path_is_an_error_of_that_request_only(guest: Guest, path: Path) -> None:
    os.truncate(path, 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        answers = [guest.ask(OUT, sector, data=bytes(512)).status for sector in (8, 0)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert answers == [1, OK]


def test_write_to_a_full_device_fails() -> None:
    fd = os.open("/dev/full", os.O_RDWR | os.O_CLOEXEC)
    with Guest(fd) as guest:
        result = wait_for(guest, lambda done: guest.worker.write(guest.slot, 0, [b"x"], done))
        assert result == -errno.ENOSPC
        assert guest.ask(OUT, 0, data=bytes(512)).status == 1
    os.close(fd)


def test_guest_data_moves_between_file_and_request(path: Path) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def swap(request: Request) -> None:
        """IN: the second half of the data from offset 1000, the first from 5000; OUT to 7000 in two pieces."""
        data = request.data()
        first, second = data.slice(0, 100), data.slice(100, request.nbytes - 100)
        if request.type == IN:
            guest.worker.read(
                guest.slot,
                1000,
                [second],
                lambda result: guest.worker.read(guest.slot, 5000, [first], lambda result: request.finish(OK)),
            )
        else:
            guest.worker.write(guest.slot, 7000, [second, b"--", first], lambda result: request.finish(OK), data=True)

    with Guest(fd, mapped=False, on_request=swap) as guest:
        content = path.read_bytes()
        answer = guest.ask(IN, 0, room=512, cuts=[50, 101, 300])
        assert answer.data == content[5000:5100] + content[1000:1412]
        data = os.urandom(512)
        assert guest.ask(OUT, 0, data=data, cuts=[17, 99, 333]).status == OK
    assert path.read_bytes()[7000:7514] == data[100:] + b"--" + data[:100]
    os.close(fd)


def test_slice_of_a_finished_request_cannot_be_read_into() -> None:
    errors: list[int | None] = []

    def late(request: Request) -> None:
        data = request.data()
        request.finish(OK)
        with pytest.raises(OSError) as caught:
            guest.worker.read(0, 0, [data], lambda result: None)
        errors.append(caught.value.errno)

    fd = os.open("/dev/zero", os.O_RDWR)
    with Guest(fd, mapped=False, on_request=late) as guest:
        assert guest.ask(IN, 0, room=512).data == bytes([UNTOUCHED]) * 512
    os.close(fd)
    assert errors == [errno.ESTALE]


@pytest.mark.parametrize(("start", "nbytes"), [(0, MIB), (5, 4096), (8192, 65536), (MIB - 10, 100), (2 * MIB, 512)])
def test_zeroed_range_reads_as_zeros_and_the_length_stays(guest: Guest, path: Path, start: int, nbytes: int) -> None:
    before = path.read_bytes()
    assert wait_for(guest, lambda done: guest.worker.zero(guest.slot, start, nbytes, done)) == 0
    expected = bytearray(before)
    expected[start : start + nbytes] = bytes(len(expected[start : start + nbytes]))
    assert path.read_bytes() == bytes(expected)


def test_zeroed_range_gives_its_space_back(guest: Guest, path: Path) -> None:
    os.sync()
    before = path.stat().st_blocks
    wait_for(guest, lambda done: guest.worker.zero(guest.slot, 0, MIB // 2, done))
    assert path.stat().st_blocks < before


def test_zeros_are_written_where_nothing_can_be_punched() -> None:
    near, far = socket.socketpair()
    with near, far, Guest(near.fileno()) as guest:
        assert wait_for(guest, lambda done: guest.worker.zero(guest.slot, 0, 100_000, done)) == 0
        assert far.recv(200_000, socket.MSG_WAITALL | socket.MSG_DONTWAIT) == bytes(100_000)


def test_more_operations_than_the_pool_holds_all_end(guest: Guest) -> None:
    results: list[int] = []
    done = threading.Event()

    def note(result: int) -> None:
        results.append(result)
        if len(results) == 5000:
            done.set()

    def begin() -> None:
        for index in range(5000):
            guest.worker.write(guest.slot, index, [bytes([index % 256])], note)

    guest.worker.call(begin)
    assert done.wait(TIMEOUT)
    assert set(results) == {0}


def test_operations_begun_from_done_go_on_for_ever_without_recursion(guest: Guest) -> None:
    left = [3000]
    done = threading.Event()

    def next_one(result: int) -> None:
        left[0] -= 1
        if left[0]:
            guest.worker.read(guest.slot, 0, [bytearray(1)], next_one)
        else:
            done.set()

    guest.worker.call(lambda: next_one(0))
    assert done.wait(TIMEOUT)


# grace


def test_grace_with_nothing_in_flight_comes_at_once(guest: Guest) -> None:
    assert wait_for(guest, guest.worker.grace) == 0


def test_grace_waits_for_what_was_in_flight_and_only_for_that() -> None:
    first, feed_first = open_pipe()
    second, feed_second = open_pipe()
    order: list[str] = []
    came = threading.Event()

    def grace_over(result: int) -> None:
        order.append("grace")
        came.set()

    with first, second, Guest(first.fileno()) as guest, feed_first, feed_second:
        slot = guest.worker.call(lambda: guest.worker.add_file(second.fileno()))

        def begin() -> None:
            guest.worker.read(guest.slot, 0, [bytearray(1)], lambda result: order.append("earlier read"))
            guest.worker.grace(grace_over)
            guest.worker.read(slot, 0, [bytearray(1)], lambda result: order.append("later read"))

        guest.worker.call(begin)
        guest.worker.call(lambda: None)
        assert order == []
        feed_first.write(b"x")
        assert came.wait(TIMEOUT)
        feed_second.write(b"x")
    assert order == ["earlier read", "grace", "later read"]


def test_grace_waits_for_a_transfer_of_the_fast_path() -> None:
    source, feed = open_pipe()
    with source, Guest(source.fileno()) as guest, feed:
        came = threading.Event()
        guest.post(IN, 0, room=512)
        guest.queue.kick()
        guest.wait_for_requests(1)
        guest.worker.call(lambda: guest.worker.grace(lambda result: came.set()))
        guest.worker.call(lambda: None)
        assert not came.is_set()
        feed.write(bytes(512))
        assert came.wait(TIMEOUT)


def test_second_grace_does_not_ride_on_the_first() -> None:
    pipes = [open_pipe() for _ in range(2)]
    order: list[str] = []
    came = [threading.Event(), threading.Event()]

    def begin(guest: Guest, slot: int, index: int) -> None:
        def grace_over(result: int) -> None:
            order.append(f"grace {index}")
            came[index].set()

        guest.worker.read(slot, 0, [bytearray(1)], lambda result: order.append(f"read {index}"))
        guest.worker.grace(grace_over)

    with ExitStack() as stack:
        for source, _ in pipes:
            stack.enter_context(source)
        guest = stack.enter_context(Guest(pipes[0][0].fileno()))
        for _, feed in pipes:
            stack.enter_context(feed)
        slot = guest.worker.call(lambda: guest.worker.add_file(pipes[1][0].fileno()))
        guest.worker.call(lambda: begin(guest, guest.slot, 0))
        guest.worker.call(lambda: begin(guest, slot, 1))
        pipes[0][1].write(b"x")
        assert came[0].wait(TIMEOUT)
        assert not came[1].is_set()
        pipes[1][1].write(b"x")
        assert came[1].wait(TIMEOUT)
    assert order == ["read 0", "grace 0", "read 1", "grace 1"]


# the second descriptor of O_DIRECT modes; here it is another file, to see which one is used


@pytest.fixture
def two_faced(path: Path, tmp_path: Path) -> Iterator[tuple[Guest, bytes, bytes]]:
    other = tmp_path / "direct"
    other.write_bytes(os.urandom(MIB))
    fds = [os.open(each, os.O_RDWR | os.O_CLOEXEC) for each in (path, other)]
    with Guest(fds[0], direct_fd=fds[1]) as guest:
        yield guest, path.read_bytes(), other.read_bytes()
    for fd in fds:
        os.close(fd)


def test_aligned_request_takes_the_direct_descriptor(two_faced: tuple[Guest, bytes, bytes]) -> None:
    guest, _, direct = two_faced
    assert guest.ask(IN, 8, room=8192, align=4096).data == direct[4096:12288]


@pytest.mark.parametrize("cuts", [[1], [4095], [511, 513]])
def test_request_in_unaligned_pieces_takes_the_buffered_one(
    two_faced: tuple[Guest, bytes, bytes], cuts: list[int]
) -> None:
    guest, buffered, _ = two_faced
    assert guest.ask(IN, 8, room=8192, align=4096, cuts=cuts).data == buffered[4096:12288]


def test_metadata_takes_the_buffered_descriptor(two_faced: tuple[Guest, bytes, bytes]) -> None:
    guest, buffered, _ = two_faced
    with mmap.mmap(-1, 8192) as aligned, memoryview(aligned) as target:
        wait_for(guest, lambda done: guest.worker.read(guest.slot, 0, [target], done))
        assert bytes(target) == buffered[:8192]


def test_guest_data_of_the_engine_takes_the_direct_descriptor(two_faced: tuple[Guest, bytes, bytes]) -> None:
    guest, _, direct = two_faced
    with mmap.mmap(-1, 8192) as aligned, memoryview(aligned) as target:
        wait_for(guest, lambda done: guest.worker.read(guest.slot, 0, [target], done, data=True))
        assert bytes(target) == direct[:8192]


def test_o_direct_really_works(path: Path) -> None:
    fds = [os.open(path, flags | os.O_RDWR | os.O_CLOEXEC) for flags in (0, os.O_DIRECT)]
    with Guest(fds[0], direct_fd=fds[1]) as guest:
        data = os.urandom(8192)
        assert guest.ask(OUT, 16, data=data, align=4096).status == OK
        assert guest.ask(IN, 16, room=8192, align=4096).data == data
        assert guest.ask(IN, 17, room=512, align=512).data == data[512:1024]
        assert guest.ask(OUT, 17, data=bytes(512), cuts=[100, 101]).status == OK
        assert guest.ask(IN, 16, room=8192, align=4096).data == data[:512] + bytes(512) + data[1024:]
    for fd in fds:
        os.close(fd)


# other threads


def test_call_returns_and_raises_what_the_function_does(guest: Guest) -> None:
    assert guest.worker.call(lambda: 42) == 42
    with pytest.raises(KeyError, match="nothing"):
        guest.worker.call(lambda: {}["nothing"])


def test_call_from_the_worker_thread_is_refused(guest: Guest) -> None:
    with pytest.raises(RuntimeError, match="cannot be used on it"):
        guest.worker.call(lambda: guest.worker.call(lambda: None))


def test_call_after_the_end_is_refused(guest: Guest) -> None:
    guest.worker.stop()
    with pytest.raises(RuntimeError, match="has ended"):
        guest.worker.call(lambda: None)


class Busy(ThreadPoolExecutor):
    """Has no thread at first: what it cannot begin it keeps, and does when there is one, as the library's own does."""

    def __init__(self) -> None:
        super().__init__(1)
        self.kept: list[Callable[[], object]] = []

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.kept.append(function)
        raise RuntimeError("can't start new thread")


class WithoutThreads(Host):
    def __init__(self) -> None:
        self.pools: list[Busy] = []

    def pool(self, nthreads: int, name: str) -> Executor:
        self.pools.append(Busy())
        return self.pools[-1]


def test_without_a_thread_computations_are_done_here_and_what_may_hang_never() -> None:
    host, done, answers, ran = WithoutThreads(), threading.Event(), [], []  # type: ignore[var-annotated]

    def end(result: int | None, error: BaseException | None) -> None:
        answers.append((result, error and type(error)))
        if len(answers) == 2:
            done.set()

    with Worker(NativeBlock(size=0), lambda request: None, host=host) as worker:
        worker.call(lambda: worker.compute(lambda: ran.append("computed") or 1, end))
        worker.call(lambda: worker.call_host(lambda: ran.append("entered the host") or 2, end))
        assert done.wait(TIMEOUT)
    for pool in host.pools:
        for function in pool.kept:
            function()
    assert ran == ["computed"]
    assert sorted(answers, key=str) == [(1, None), (None, BlockingIOError)]


def test_compute_runs_elsewhere_and_answers_here(guest: Guest) -> None:
    threads: list[int] = []
    answers: list[object] = []
    done = threading.Event()

    def end(result: int | None, error: BaseException | None) -> None:
        answers.append((result, type(error)))
        threads.append(threading.get_ident())
        if len(answers) == 2:
            done.set()

    worker_thread = guest.worker.call(threading.get_ident)
    guest.worker.call(lambda: guest.worker.compute(threading.get_ident, end))
    guest.worker.call(lambda: guest.worker.compute(lambda: 1 // 0, end))
    assert done.wait(TIMEOUT)
    assert threads == [worker_thread] * 2
    assert (None, ZeroDivisionError) in answers
    assert (worker_thread, type(None)) not in answers
