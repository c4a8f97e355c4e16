"""Front-ends and drivers of other habits than QEMU's and Linux's: legacy ones, those that do not kick or listen."""

import fcntl
import json
import os
import select
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.builder import Recipe, build
from tests.frontend import (
    F_FLUSH,
    F_WRITE_ZEROES,
    GET_ID,
    IN,
    OK,
    QUEUE_SIZE,
    SET_CONFIG,
    SET_VRING_ADDR,
    SET_VRING_BASE,
    SET_VRING_CALL,
    SET_VRING_ENABLE,
    SET_VRING_KICK,
    SET_VRING_NUM,
    USER_ADDRESS,
    ZONE,
    FrontEnd,
    Queue,
)
from tests.packedqueue import PackedQueue
from tests.patience import TIMEOUT
from tests.program import Daemon, complaints

pytestmark = pytest.mark.xdist_group("daemon habits")  # one daemon for many

NO_FD = 0x100
SET_VRING_ERR = 14
FLUSH_OUT = 5  # virtio 0.9.5


class LegacyFrontEnd(FrontEnd):
    generation = 0


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return build(Recipe(size=1 << 20), tmp_path / "a").path


def test_legacy_driver_is_served(image: Path) -> None:
    with Daemon(image) as daemon, LegacyFrontEnd(daemon.socket_path) as guest:
        assert not guest.features & 1 << 32
        guest.write(4096, b"legacy" * 512)
        guest.flush()
        assert guest.read(4096, 3072) == b"legacy" * 512


@pytest.mark.parametrize("barrier", [0, 1 << 31])
def test_flush_of_a_legacy_driver_is_one(image: Path, barrier: int) -> None:
    with Daemon(image, "--stats") as daemon, LegacyFrontEnd(daemon.socket_path) as guest:
        assert guest.do(FLUSH_OUT | barrier).status == OK
        guest.socket.close()
        daemon.stop()
        assert daemon.process.stdout is not None
        assert json.loads(daemon.process.stdout.read())["flushes"] == 1


@pytest.mark.parametrize("queue_type", [Queue, PackedQueue])
def test_driver_that_neither_kicks_nor_wants_calls_is_served(image: Path, queue_type: type[Queue]) -> None:
    with Daemon(image) as daemon, FrontEnd(daemon.socket_path, queue_type=queue_type) as guest:
        guest.tell(SET_VRING_CALL, struct.pack("<Q", NO_FD))
        guest.tell(SET_VRING_KICK, struct.pack("<Q", NO_FD))
        deadline = time.monotonic() + TIMEOUT
        for _ in range(5):
            guest.submit(GET_ID, nbytes=20)
            while not (done := guest.reap()):
                assert time.monotonic() < deadline
            assert [one.status for one in done] == [OK]


@pytest.mark.parametrize("window", [(0, 8, 0), (32, 1, 2), (57, 3, 1), (200, 56, 0)])
def test_write_to_a_read_only_field_does_not_cost_the_connection(image: Path, window: tuple[int, int, int]) -> None:
    """A front-end hands on what its guest writes, and may not ask whether that was done."""
    with Daemon(image) as daemon, FrontEnd(daemon.socket_path) as guest:
        before = guest.read_config()
        guest._send(SET_CONFIG, struct.pack("<III", *window) + b"\xff" * window[1])
        assert guest.read_config() == before
        guest.write(0, b"1" * 512)


def test_guest_keeps_its_disk_when_the_next_daemon_offers_less(image: Path) -> None:
    with Daemon(image) as first, FrontEnd(first.socket_path, features=F_FLUSH | F_WRITE_ZEROES) as guest:
        guest.insists = True
        first.kill()
        with Daemon(image, "--read-only") as second:
            guest.connect(second.socket_path)
            assert guest.read(0, 512) == bytes(512)
            assert guest.do(13, 0, struct.pack("<QII", 0, 1, 0)).status != OK


def test_back_end_channel_that_was_made_to_block_holds_nobody_up(image: Path) -> None:
    with Daemon(image) as daemon:
        with FrontEnd(daemon.socket_path) as guest, guest.open_backend_channel(blocking=True) as channel:
            channel.send(b"\2\0\0\0")  # a part of a header
            guest.write(0, b"1" * 512)
            guest.read_config()
        with FrontEnd(daemon.socket_path) as other:
            assert other.read(0, 512) == b"1" * 512
        daemon.stop()


def test_call_that_was_made_to_block_and_is_full_stalls_no_ring(image: Path) -> None:
    """Nobody waits for the daemon meanwhile, which could wake it."""
    with Daemon(image) as daemon, FrontEnd(daemon.socket_path, queues=2) as guest:
        full = guest.queues[1].call
        guest.queues[1].submit(IN, 0, nbytes=512)
        select.select([full], [], [])
        os.eventfd_read(full)
        os.eventfd_write(full, (1 << 64) - 2)
        fcntl.fcntl(full, fcntl.F_SETFL, fcntl.fcntl(full, fcntl.F_GETFL) & ~os.O_NONBLOCK)
        guest.queues[1].submit(IN, 0, nbytes=512)
        guest.write(0, b"1" * 512)
        daemon.stop(signal.SIGTERM)


RING = USER_ADDRESS + 0x10000  # of guest memory, where nothing else is
NO_RINGS = {
    "no entry": (0, 0, RING, RING, RING),
    "no power of two": (3, 0, RING, RING, RING),
    "too many entries": (65536, 0, RING, RING, RING),
    "2^31 entries": (1 << 31, 0, RING, RING, RING),
    "descriptors not aligned": (QUEUE_SIZE, 0, RING + 8, RING, RING),
    "available ring not aligned": (QUEUE_SIZE, 0, RING, RING, RING + 1),
    "used ring not aligned": (QUEUE_SIZE, 0, RING, RING + 2, RING),
    "outside memory": (QUEUE_SIZE, 0, 16, 16, 16),
    "over the end of memory": (QUEUE_SIZE, 0, USER_ADDRESS + 2 * ZONE - 16, RING, RING),
    "over the end of addresses": (QUEUE_SIZE, 0, (1 << 64) - 16, RING, RING),
    "a base of 17 bits": (QUEUE_SIZE, 1 << 16, RING, RING, RING),
}


@pytest.mark.parametrize("said", NO_RINGS.values(), ids=NO_RINGS)
def test_what_cannot_be_a_ring_costs_that_ring_alone(
    two_queues: tuple[Daemon, FrontEnd], said: tuple[int, int, int, int, int]
) -> None:
    """A guest chooses the size and the place of each ring; QEMU hands them on as they are."""
    _, guest = two_queues
    size, base, descriptors, used, available = said
    err = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        before = guest.stop_queue(1)
        guest.tell(SET_VRING_NUM, struct.pack("<II", 1, size))
        guest.tell(SET_VRING_BASE, struct.pack("<II", 1, base))
        guest.tell(SET_VRING_ADDR, struct.pack("<IIQQQQ", 1, 0, descriptors, used, available, 0))
        guest.tell(SET_VRING_ERR, struct.pack("<Q", 1), fds=(err,))
        guest.tell(SET_VRING_KICK, struct.pack("<Q", 1), fds=(guest.queues[1].kick,))
        assert os.eventfd_read(err) > 0
        guest.tell(SET_VRING_ENABLE, struct.pack("<II", 1, 1))
        guest.write(0, b"beside" * 512)
        assert guest.stop_queue(1) == base
        guest.start_queue(before, index=1)
        do_on(guest, 1)
    finally:
        os.close(err)


def do_on(guest: FrontEnd, index: int) -> None:
    """A request on that queue, to its completion."""
    queue = guest.queues[index]
    queue.submit(IN, 0, nbytes=512)
    while not (done := list(queue.reap())):
        guest.wait_for_call()
    assert [one.status for one in done] == [OK]


@pytest.fixture(scope="module")
def two_queues(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, FrontEnd]]:
    """One front-end on one connection, which every ring that is none leaves as it is."""
    path = build(Recipe(size=1 << 20), tmp_path_factory.mktemp("rings") / "a").path
    with Daemon(path) as daemon, FrontEnd(daemon.socket_path, queues=2) as guest:
        yield daemon, guest
        guest.socket.close()
        daemon.stop()


def test_refusal_names_the_message_and_what_is_wrong_once_a_visit(image: Path) -> None:
    with Daemon(image) as daemon:
        with FrontEnd(daemon.socket_path) as guest, image.open() as file:
            for _ in range(2):
                with pytest.raises(AssertionError):
                    guest.tell(SET_VRING_CALL, struct.pack("<Q", 0), fds=(file.fileno(),))
        daemon.stop()
        assert daemon.process.stderr is not None
        said = complaints(daemon.process.stderr.read())
    assert said == "vhost-user-qcow2: the front-end is refused SET_VRING_CALL: call of queue 0: Invalid argument\n"
