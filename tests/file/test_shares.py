"""What there is little of is shared: no queue and no file takes all of it, however long its requests hang."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from bench.driver import Buffer, DriverQueue
from ring.aio import Aio
from ring.request import Request
from tests import slowdisk
from tests.blockguest import FLUSH, IN, MIB, OK, Guest
from tests.patience import TIMEOUT
from tests.slowdisk import SlowDisk

KIB = 1 << 10


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SlowDisk]:
    backing, mount_point = tmp_path / "backing", tmp_path / "slow"
    backing.mkdir()
    mount_point.mkdir()
    for name in ("hanging", "other"):
        (backing / name).write_bytes(bytes(MIB))
    with SlowDisk(backing, mount_point) as disk:
        yield disk


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def answered(guest: Guest, queue: DriverQueue, type: int) -> int:
    """The status that a request without data is answered with."""
    posted = guest.post(type, queue=queue)
    queue.kick()
    return guest.answer(posted, queue.wait()[0]).status


def write_beside(guest: Guest, fd: int, nbytes: int) -> None:
    """Write through the worker to another file, as the engine does, and wait for that."""
    written = threading.Event()

    def begin() -> None:
        guest.worker.write(guest.worker.add_file(fd), 0, [bytes(nbytes)], lambda result: written.set())

    guest.worker.call(begin)
    assert written.wait(TIMEOUT)


@pytest.mark.parametrize("aio", [Aio.AUTO, Aio.THREADS])
@pytest.mark.parametrize("where", ["near", "far"])
def test_a_file_that_hangs_leaves_threads_for_others(disk: SlowDisk, tmp_path: Path, aio: Aio, where: str) -> None:
    other = tmp_path / "near" if where == "near" else disk.path / "other"
    with opened(disk.path / "hanging") as fd, opened(other) as other_fd, Guest(fd, aio=aio) as guest:
        with disk.holding(slowdisk.READ):
            reads = [guest.post(IN, 20 * number, room=512, indirect=True) for number in range(100)]
            guest.queue.kick()
            disk.wait_for_one()
            write_beside(guest, other_fd, 128 * KIB)  # too much to be written at once
        assert {answer.status for answer in guest.ask_all(reads)} == {OK}


def test_queues_that_hang_leave_operations_for_others(disk: SlowDisk) -> None:
    with ExitStack() as stack:
        fd = stack.enter_context(opened(disk.path / "hanging"))
        guest = stack.enter_context(Guest(fd, queue_size=1024))
        second, third, other = (stack.enter_context(DriverQueue(guest.memory, 1024)) for _ in range(3))
        for index, queue in enumerate((second, third, other), 1):
            guest.worker.call(lambda index=index, queue=queue: guest.start_queue(index, queue))
        with disk.holding(slowdisk.READ):
            for queue in (guest.queue, second, third):
                for number in range(1024):
                    guest.post(IN, number % 64 * 32, room=512, queue=queue, indirect=True)
                queue.kick()
            disk.wait_for_one()
            assert answered(guest, other, FLUSH) == OK
        for queue in (guest.queue, second, third):
            assert len(queue.wait(1024)) == 1024


@contextmanager
def hoarding(post: Callable[[Guest, DriverQueue], None], count: int) -> Iterator[list[Request]]:
    """*count* requests on one queue and one on another, of which none is answered before the end -> those that came."""
    held: list[Request] = []
    came = threading.Condition()

    def hold(request: Request) -> None:
        with came:
            held.append(request)
            came.notify()

    with Guest(size=1 << 42, on_request=hold) as guest, DriverQueue(guest.memory, 128) as other:
        guest.worker.call(lambda: guest.start_queue(1, other))
        for _ in range(count):
            post(guest, guest.queue)
        guest.queue.kick()
        guest.wait_for_requests(1)
        post(guest, other)
        other.kick()
        with came:
            assert came.wait_for(lambda: any(request.queue == 1 for request in held), TIMEOUT)
        yield held
        answered = 0
        while answered <= count:
            with came:
                assert came.wait_for(lambda answered=answered: len(held) > answered, TIMEOUT)
                ready, answered = held[answered:], len(held)
            guest.worker.call(lambda ready=ready: [request.finish(OK) for request in ready])


def post_large_read(guest: Guest, queue: DriverQueue) -> None:
    """256 MiB, into the same 4 MiB 64 times over."""
    header = guest.memory.allocate(17)
    guest.memory.store(header, bytes(16))
    buffers = [Buffer(header, 16), *[Buffer(8 * MIB, 4 * MIB, True)] * 64, Buffer(header + 16, 1, True)]
    queue.add(buffers, table_address=guest.memory.allocate(16 * len(buffers)))


def test_a_queue_whose_requests_are_large_leaves_room_for_others() -> None:
    with hoarding(post_large_read, 8) as held:
        assert 0 < sum(request.queue == 0 for request in held) < 4


def test_a_queue_whose_requests_are_in_many_pieces_leaves_room_for_others() -> None:
    def post_in_pieces(guest: Guest, queue: DriverQueue) -> None:
        guest.post(IN, room=20 * 512, cuts=range(512, 20 * 512, 512), indirect=True, queue=queue)

    with hoarding(post_in_pieces, 128) as held:
        assert sum(request.queue == 0 for request in held) <= 128
