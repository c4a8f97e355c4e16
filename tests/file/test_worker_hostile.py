"""Rings that lie: the queue stops, its err fd is signalled, the other queue and the worker go on."""

import os
import struct
import threading
from collections.abc import Callable

import pytest

from bench.driver import Buffer, DriverQueue, wait_readable
from ring.request import Request
from tests.blockguest import IN, IOERR, MIB, OK, Guest
from tests.patience import TIMEOUT

NEXT, WRITE, INDIRECT = 1, 2, 4  # virtio 1.2, 2.7.5


def put_descriptor(guest: Guest, table: int, index: int, address: int, nbytes: int, flags: int, next: int = 0) -> None:
    guest.memory.store(table + 16 * index, struct.pack("<QIHH", address, nbytes, flags, next))


def post_descriptors(guest: Guest, *descriptors: tuple[int, int, int, int]) -> None:
    """Write *descriptors* at the start of the ring's table and post head 0."""
    for index, (address, nbytes, flags, next) in enumerate(descriptors):
        put_descriptor(guest, guest.queue.layout.descriptor_address, index, address, nbytes, flags, next)
    guest.queue.add_head(0)
    guest.queue.kick()


def post_indirect(guest: Guest, table_nbytes: int, *descriptors: tuple[int, int, int, int]) -> None:
    """The same in an indirect table that says to be *table_nbytes* long."""
    table = guest.memory.allocate(16 * len(descriptors))
    for index, (address, nbytes, flags, next) in enumerate(descriptors):
        put_descriptor(guest, table, index, address, nbytes, flags, next)
    post_descriptors(guest, (table, table_nbytes, INDIRECT, 0))


def available_index_lies(guest: Guest) -> None:
    guest.memory.store(guest.queue.layout.driver_address + 2, struct.pack("<H", 129))
    os.eventfd_write(guest.queue.kick_fd, 1)


def head_past_the_table(guest: Guest) -> None:
    guest.queue.add_head(128)
    guest.queue.kick()


def nested_indirect(guest: Guest) -> None:
    post_indirect(guest, 16, (0, 16, INDIRECT, 0))


HOSTILE: dict[str, tuple[str, Callable[[Guest], None]]] = {
    "avail": ("the available index is more than the queue size ahead", available_index_lies),
    "head": ("a head is past the end of the descriptor table", head_past_the_table),
    "loop of one": ("a chain loops", lambda guest: post_descriptors(guest, (0, 16, NEXT, 0))),
    "loop of two": ("a chain loops", lambda guest: post_descriptors(guest, (0, 16, NEXT, 1), (0, 16, NEXT, 0))),
    "next past the table": (
        "a descriptor index is past the end of its table",
        lambda guest: post_descriptors(guest, (0, 16, NEXT, 128)),
    ),
    "outside": (
        "a buffer lies outside guest memory",
        lambda guest: post_descriptors(guest, (16 * MIB, 16, 0, 0)),
    ),
    "last byte outside": (
        "a buffer lies outside guest memory",
        lambda guest: post_descriptors(guest, (16 * MIB - 15, 16, 0, 0)),
    ),
    "address wraps": (
        "a buffer lies outside guest memory",
        lambda guest: post_descriptors(guest, ((1 << 64) - 8, 16, 0, 0)),
    ),
    "readable after writable": (
        "a readable buffer follows a writable one",
        lambda guest: post_descriptors(guest, (0, 16, WRITE | NEXT, 1), (0, 16, 0, 0)),
    ),
    "indirect with next": (
        "an indirect descriptor has a next one",
        lambda guest: post_descriptors(guest, (0, 16, INDIRECT | NEXT, 1)),
    ),
    "indirect of nothing": (
        "the length of an indirect table is not a multiple of 16",
        lambda guest: post_indirect(guest, 0, (0, 16, 0, 0)),
    ),
    "indirect of 17 bytes": (
        "the length of an indirect table is not a multiple of 16",
        lambda guest: post_indirect(guest, 17, (0, 16, 0, 0)),
    ),
    "indirect outside": (
        "an indirect table lies outside guest memory",
        lambda guest: post_descriptors(guest, (16 * MIB - 16, 32, INDIRECT, 0)),
    ),
    "indirect in indirect": ("an indirect table holds an indirect descriptor", nested_indirect),
    "indirect next past the table": (
        "a descriptor index is past the end of its table",
        lambda guest: post_indirect(guest, 16, (0, 16, NEXT, 1)),
    ),
    "indirect loop": (
        "a chain is longer than 1024 descriptors",
        lambda guest: post_indirect(guest, 32, (0, 16, NEXT, 1), (0, 16, NEXT, 0)),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_ring_that_lies_breaks_its_queue(name: str) -> None:
    fault, attack = HOSTILE[name]
    with Guest() as guest:
        attack(guest)
        wait_readable(guest.queue.err_fd, 10)
        assert guest.broken.wait(TIMEOUT)
        assert guest.faults == [fault]


def test_head_posted_again_in_flight_breaks_the_queue() -> None:
    held: list[Request] = []
    with Guest(on_request=held.append) as guest:
        posted = guest.post(IN, room=512)
        guest.queue.add_head(posted.head)
        guest.queue.kick()
        wait_readable(guest.queue.err_fd, 10)
        assert guest.broken.wait(TIMEOUT)
        guest.worker.call(lambda: held[0].finish(OK))
        assert guest.faults == ["a head is posted again while it is in flight"]


def test_the_same_head_after_its_completion_is_fine() -> None:
    with Guest() as guest:
        posted = guest.post(IN, room=512)
        guest.queue.kick()
        guest.queue.wait()
        for _ in range(3):
            guest.queue.add_head(posted.head)
            guest.queue.kick()
            assert guest.queue.wait()[0].head == posted.head


def test_other_queue_is_served_after_one_broke() -> None:
    with Guest() as guest, DriverQueue(guest.memory, 8) as other:
        guest.worker.call(lambda: guest.start_queue(1, other))
        head_past_the_table(guest)
        assert guest.broken.wait(TIMEOUT)
        posted = guest.post(IN, room=512, queue=other)
        other.kick()
        assert guest.answer(posted, other.wait()[0]).status == OK


def test_broken_queue_is_not_read_again() -> None:
    with Guest() as guest:
        head_past_the_table(guest)
        assert guest.broken.wait(TIMEOUT)
        guest.post(IN, room=512)
        os.eventfd_write(guest.queue.kick_fd, 1)
        guest.worker.call(lambda: None)
        assert guest.queue.poll() is None


def test_broken_queue_serves_again_once_restarted() -> None:
    with Guest() as guest, DriverQueue(guest.memory, 8) as fresh:
        head_past_the_table(guest)
        assert guest.broken.wait(TIMEOUT)
        assert guest.drain() == 0
        guest.worker.call(lambda: guest.start_queue(0, fresh))
        posted = guest.post(IN, room=512, queue=fresh)
        fresh.kick()
        assert guest.answer(posted, fresh.wait()[0]).status == OK


def test_descriptors_of_no_bytes_are_passed_over() -> None:
    with Guest() as guest:
        header, status = guest.memory.allocate(16), guest.memory.allocate(1)
        guest.memory.store(header, struct.pack("<IIQ", IN, 0, 0))
        guest.queue.add([Buffer(header, 0), Buffer(header, 16), Buffer(status, 0, True), Buffer(status, 1, True)])
        guest.queue.kick()
        assert guest.queue.wait()[0].nbytes == 1


def post_long_read(guest: Guest, count: int) -> int:
    """A read into the same 4 MiB, *count* times over; the address of its status byte."""
    header, status = guest.memory.allocate(16), guest.memory.allocate(1)
    guest.memory.store(header, struct.pack("<IIQ", IN, 0, 0))
    buffers = [Buffer(header, 16), *[Buffer(8 * MIB, 4 * MIB, True)] * count, Buffer(status, 1, True)]
    guest.queue.add(buffers, table_address=guest.memory.allocate(16 * len(buffers)))
    return status


@pytest.mark.parametrize(("count", "status"), [(511, OK), (512, IOERR)])
def test_one_request_moves_less_than_two_gib(count: int, status: int) -> None:
    with Guest(size=1 << 42) as guest:
        at = post_long_read(guest, count)
        guest.queue.kick()
        guest.queue.wait()
        assert guest.memory.load(at, 1)[0] == status


def test_requests_wait_while_those_of_their_queue_move_half_a_gib() -> None:
    held: list[Request] = []
    seen = threading.Semaphore(0)

    def hold(request: Request) -> None:
        held.append(request)
        seen.release()

    with Guest(size=1 << 42, on_request=hold) as guest:
        for _ in range(4):
            post_long_read(guest, 64)
        guest.queue.kick()
        for _ in range(2):
            assert seen.acquire(timeout=TIMEOUT)
        guest.worker.call(lambda: None)
        assert len(held) == 2
        guest.worker.call(lambda: [request.finish(OK) for request in held])
        for _ in range(2):
            assert seen.acquire(timeout=TIMEOUT)
        guest.worker.call(lambda: [request.finish(OK) for request in held[2:]])
        guest.queue.wait(4)


def test_kick_that_cannot_be_polled_breaks_the_queue() -> None:
    with Guest() as guest:
        reader, writer = os.pipe()
        os.close(writer)
        guest.worker.call(lambda: guest.worker.set_kick(0, reader))
        assert guest.broken.wait(TIMEOUT)
        assert guest.faults == ["the kick is not an eventfd, or is closed"]


@pytest.mark.parametrize("path", ["/dev/zero", "/tmp", __file__])
@pytest.mark.parametrize("which", ["kick of queue 0", "call of queue 0", "err of queue 0", "call of the log"])
def test_signal_that_never_makes_anybody_wait_is_refused(path: str, which: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    with Guest() as guest:
        worker = guest.worker
        takes: dict[str, Callable[[], None]] = {
            "kick of queue 0": lambda: worker.set_kick(0, fd),
            "call of queue 0": lambda: worker.set_call(0, fd),
            "err of queue 0": lambda: worker.set_err(0, fd),
            "call of the log": lambda: worker.set_log_call(fd),
        }
        with pytest.raises(OSError, match=which):
            worker.call(takes[which])


def test_full_call_does_not_stop_the_worker() -> None:
    with Guest() as guest:
        blocking = os.eventfd(0xFFFFFFFE, os.EFD_CLOEXEC)
        os.write(blocking, struct.pack("=Q", 0xFFFFFFFFFFFFFFFE - 0xFFFFFFFE))
        guest.worker.call(lambda: guest.worker.set_call(0, os.dup(blocking)))
        posted = guest.post(IN, room=512)
        guest.queue.kick()
        guest.wait_for_requests(1)
        guest.drain()
        os.close(blocking)
        completion = guest.queue.poll()
        assert completion is not None
        assert completion.head == posted.head
