"""Packed virtqueues: laps, chains of every shape, notifications, and drivers that lie."""

import itertools
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from bench.driver import DriverQueue, wait_readable
from ring.request import Request
from tests.blockguest import FLUSH, IN, MIB, OK, OUT, Guest
from tests.patience import TIMEOUT

NEXT, WRITE, INDIRECT = 1, 2, 4  # virtio 1.2, 2.8.6
AVAILABLE, USED = 1 << 7, 1 << 15
HEADER = 1 << 16  # where a request's header lies
DISABLE = 1  # RING_EVENT_FLAGS_DISABLE


class PackedGuest(Guest):
    """A guest whose queue is a packed one."""

    def __init__(
        self,
        fd: int | None = None,
        *,
        queue_size: int = 128,
        event_idx: bool = False,
        base: int | None = None,
        on_request: Callable[[Request], None] | None = None,
    ) -> None:
        super().__init__(fd, on_request=on_request)
        self._packed: dict[str, Any] = {"size": queue_size, "event_idx": event_idx, "base": base}

    def _set_up(self) -> None:
        self.queue = DriverQueue(self.memory, **self._packed, packed=True)
        super()._set_up()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.queue.close()


def base_of(index: int, wrap: bool) -> int:
    return (index | wrap << 15) * 0x10001


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("size", [1, 3, 7, 8, 100])
@pytest.mark.parametrize("wrap", [False, True])
def test_ring_goes_round_and_round(event_idx: bool, size: int, wrap: bool) -> None:
    """Sizes need not be powers of two, and a chain may begin at the end of one lap and end in the next."""
    start = size - 1
    with PackedGuest(event_idx=event_idx, queue_size=size, base=base_of(start, wrap)) as guest:
        for _ in range(40):
            assert guest.ask(IN, 0, room=512, indirect=True).status == OK
        for _ in range(10):
            answers = guest.ask_all([guest.post(IN, 0, room=512, indirect=True) for _ in range(size)])
            assert {answer.status for answer in answers} == {OK}
        end = start + 40 + 10 * size
        assert guest.drain() == base_of(end % size, wrap ^ (end // size % 2 == 1))


def test_chains_of_every_length_share_a_ring() -> None:
    with PackedGuest(queue_size=13) as guest:
        for cuts in itertools.islice(itertools.cycle(range(9)), 200):
            answer = guest.ask(IN, 0, room=512, cuts=[50 * cut for cut in range(cuts)])
            assert (answer.status, answer.nbytes) == (OK, 513)


def test_what_is_written_is_read_back() -> None:
    fd = os.memfd_create("disk")
    os.truncate(fd, MIB)
    with PackedGuest(fd, event_idx=True, queue_size=24) as guest:
        for number in range(100):
            data = bytes([number]) * 4096
            indirect = number % 3 == 0
            assert guest.ask(OUT, 8 * number, data=data, cuts=[1000 * (number % 4)], indirect=indirect).status == OK
            assert guest.ask(IN, 8 * number, room=4096, cuts=[512], indirect=not indirect).data == data
        assert guest.ask(FLUSH).status == OK
    os.close(fd)


def test_requests_complete_out_of_order() -> None:
    """A used element lies where the used ones go on, not where its chain was, and stands for the chain's length."""
    held: list[Request] = []
    with PackedGuest(on_request=held.append, queue_size=16) as guest:
        posted = [guest.post(IN, 0, room=512, cuts=[100] * (number % 2)) for number in range(4)]
        guest.queue.kick()
        guest.wait_for_requests(4)
        for position in (2, 0, 3, 1):
            guest.worker.call(lambda position=position: held[position].finish(OK))
            assert guest.queue.wait()[0].head == posted[position].head
        assert guest.ask_all([]) == []
        held.clear()
        again = [guest.post(IN, 0, room=512) for _ in range(5)]
        guest.queue.kick()
        guest.wait_for_requests(9)
        guest.worker.call(lambda: [request.finish(OK) for request in reversed(held)])
        assert {completion.head for completion in guest.queue.wait(5)} == {each.head for each in again}


@pytest.mark.parametrize("event_idx", [False, True])
def test_no_wake_up_is_lost(event_idx: bool) -> None:
    with PackedGuest(event_idx=event_idx, queue_size=4) as guest:
        posted = guest.post(IN, 0, room=512, indirect=True)
        guest.queue.kick()
        guest.queue.wait()
        for _ in range(5000):
            guest.queue.add_head(posted.head)
            guest.queue.kick()
            guest.queue.wait()


def test_event_idx_asks_for_one_call_for_a_batch() -> None:
    with PackedGuest(event_idx=True) as guest:
        assert guest.ask(IN, 0, room=512).status == OK
        before = guest.counters.calls
        for _ in range(32):
            guest.post(IN, 0, room=512, indirect=True)
        guest.queue.kick()
        guest.wait_for_requests(33)
        guest.drain()
        assert guest.counters.calls - before <= 1


def test_driver_that_wants_no_interrupt_is_not_called() -> None:
    with PackedGuest() as guest:
        guest.memory.store(guest.queue.layout.driver_address, struct.pack("<HH", 0, DISABLE))
        for _ in range(8):
            guest.post(IN, 0, room=512)
            guest.queue.kick()
        guest.wait_for_requests(8)
        guest.drain()
        assert guest.counters.calls == 0


def test_base_says_where_fetching_and_giving_back_stopped() -> None:
    with PackedGuest(queue_size=10) as guest:
        for _ in range(3):
            guest.ask(IN, 0, room=512)  # of three descriptors
        assert guest.drain() == base_of(9, True)
        layout = guest.queue.layout
        with DriverQueue(guest.memory, 10, packed=True, base=base_of(9, True)) as queue:
            assert queue.layout.base != layout.base
            guest.worker.call(lambda: guest.start_queue(0, queue))
            posted = guest.post(IN, 0, room=512, queue=queue)
            queue.kick()
            assert guest.answer(posted, queue.wait()[0]).status == OK
            assert guest.drain() == base_of(2, False)


@pytest.mark.parametrize("base", [8, 8 << 16, 0x80000001, 0x00018002])
def test_impossible_base_is_refused(base: int) -> None:
    """Positions past the ring, or more descriptors between them than the ring has."""
    with Guest() as guest, DriverQueue(guest.memory, 8, packed=True) as queue:
        layout = replace(queue.layout, base=base)
        with pytest.raises(OSError, match="Invalid argument"):
            guest.worker.call(lambda: guest.worker.start_queue(1, layout))


def put_cell(guest: Guest, index: int, address: int, nbytes: int, identity: int, flags: int) -> None:
    flags |= AVAILABLE  # of the first lap
    guest.memory.store(
        guest.queue.layout.descriptor_address + 16 * index, struct.pack("<QIHH", address, nbytes, identity, flags)
    )


def post_cells(guest: Guest, *cells: tuple[int, int, int, int]) -> None:
    for index, cell in reversed(list(enumerate(cells))):
        put_cell(guest, index, *cell)
    os.eventfd_write(guest.queue.kick_fd, 1)


def post_indirect(guest: Guest, nbytes: int, *cells: tuple[int, int, int, int]) -> None:
    table = guest.memory.allocate(16 * len(cells))
    guest.memory.store(table, b"".join(struct.pack("<QIHH", *cell) for cell in cells))
    post_cells(guest, (table, nbytes, 0, INDIRECT))


@pytest.mark.parametrize("identity", [0, 128, 0x8000, 0xFFFF])
def test_buffer_id_may_be_any_number(identity: int) -> None:
    with PackedGuest() as guest:
        guest.memory.store(HEADER, struct.pack("<IIQ", IN, 0, 0))
        post_cells(guest, (HEADER, 16, identity, NEXT), (HEADER + 16, 513, identity, WRITE))
        wait_readable(guest.queue.call_fd, 10)
        guest.drain()
        cell = bytes(guest.memory.load(guest.queue.layout.descriptor_address, 16))
        assert struct.unpack("<IHH", cell[8:]) == (513, identity, AVAILABLE | USED | WRITE)
        assert guest.memory.load(HEADER + 16 + 512, 1) == bytes([OK])


HOSTILE: dict[str, tuple[str, Callable[[Guest], None]]] = {
    "a chain without an end": (
        "more descriptors are available than the ring has",
        lambda guest: post_cells(guest, *[(0, 16, 0, NEXT)] * 128),
    ),
    "the same id twice": (
        "a buffer id is posted again while it is in flight",
        lambda guest: post_cells(guest, *[(HEADER, 16, 5, NEXT), (HEADER + 16, 513, 5, WRITE)] * 2),
    ),
    "outside": ("a buffer lies outside guest memory", lambda guest: post_cells(guest, (16 * MIB - 15, 16, 0, 0))),
    "readable after writable": (
        "a readable buffer follows a writable one",
        lambda guest: post_cells(guest, (0, 16, 0, WRITE | NEXT), (0, 16, 0, 0)),
    ),
    "indirect in a chain": (
        "an indirect descriptor is part of a chain",
        lambda guest: post_cells(guest, (0, 16, 0, NEXT), (0, 16, 0, INDIRECT)),
    ),
    "indirect with next": (
        "an indirect descriptor has a next one",
        lambda guest: post_cells(guest, (0, 16, 0, INDIRECT | NEXT), (0, 16, 0, 0)),
    ),
    "indirect of 17 bytes": (
        "the length of an indirect table is not a multiple of 16",
        lambda guest: post_indirect(guest, 17, (0, 16, 0, 0)),
    ),
    "indirect outside": (
        "an indirect table lies outside guest memory",
        lambda guest: post_cells(guest, (16 * MIB - 16, 32, 0, INDIRECT)),
    ),
    "indirect too long": (
        "a chain is longer than 1024 descriptors",
        lambda guest: post_cells(guest, (0, 16 * 1025, 0, INDIRECT)),
    ),
    "indirect in indirect": (
        "an indirect table holds an indirect descriptor",
        lambda guest: post_indirect(guest, 16, (0, 16, 0, INDIRECT)),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_ring_that_lies_breaks_its_queue(name: str) -> None:
    fault, attack = HOSTILE[name]
    held: list[Request] = []
    with PackedGuest(on_request=held.append) as guest:
        guest.memory.store(HEADER, struct.pack("<IIQ", IN, 0, 0))
        attack(guest)
        wait_readable(guest.queue.err_fd, 10)
        assert guest.broken.wait(TIMEOUT)
        assert guest.faults == [fault]
        guest.worker.call(lambda: [request.finish(OK) for request in held])


def test_driver_that_turns_flags_round_gets_no_more_than_its_ring() -> None:
    """Each slot is made available again, a lap later, while what was fetched from it is in flight."""
    held: list[Request] = []
    with PackedGuest(queue_size=4, on_request=held.append) as guest:
        guest.memory.store(HEADER, struct.pack("<IIQ", IN, 0, 0))
        at = guest.queue.layout.descriptor_address
        for number in range(3):
            mark = AVAILABLE if number < 2 else USED
            cells = [(HEADER, 16, number, NEXT | mark), (HEADER + 16, 513, number, WRITE | mark)]
            for index in (1, 0):
                guest.memory.store(at + 16 * (2 * number % 4 + index), struct.pack("<QIHH", *cells[index]))
            os.eventfd_write(guest.queue.kick_fd, 1)
            guest.wait_for_requests(min(number + 1, 2))
        assert guest.broken.wait(TIMEOUT)
        assert guest.faults == ["more descriptors are available than the ring has"]
        guest.worker.call(lambda: [request.finish(OK) for request in held])
