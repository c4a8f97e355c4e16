"""What a guest's requests meet is told once a minute for as long as it comes: the next outage is told as the first."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

import qcow2
from tests.file.test_daemon_failure import fail_a_metadata_write
from tests.frontend import IN, IOERR, QUEUE_SIZE, SET_VRING_ERR, SET_VRING_KICK, SET_VRING_NUM, BackendGone, FrontEnd
from tests.patience import TIMEOUT
from tests.program import Daemon
from tests.served import Served, serve
from vhost import Control
from vhost.problem import AGAIN_SECONDS, TOLD_MAX, Told

CLUSTER = 65536
MIB = 1 << 20
L1_OFFSET = 40  # of the header


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Its first cluster is said to lie where none can."""
    path = tmp_path / "disk"
    qcow2.create(path, size=MIB)
    with qcow2.open(path, "r+") as disk:
        disk.write(0, b"d" * CLUSTER)
    with path.open("r+b") as file:
        file.seek(L1_OFFSET)
        file.seek(*struct.unpack(">Q", file.read(8)))
        file.seek(struct.unpack(">Q", file.read(8))[0] & 0x00FFFFFFFFFFFE00)
        file.write(struct.pack(">Q", 1 << 63 | 0x200))
    return path


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_error_that_comes_again_is_told_again(image: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with serve(image) as served, FrontEnd(served.socket_path) as guest:
        served.backend.told = Told(clock)
        for moment in (0.0, 1.0, AGAIN_SECONDS - 1, AGAIN_SECONDS, AGAIN_SECONDS + 1, 5 * AGAIN_SECONDS):
            clock.seconds = moment
            assert guest.do(IN, 0, nbytes=CLUSTER).status == IOERR
        assert len(caplog.messages) == 3
        assert len(set(caplog.messages)) == 1


def test_flood_of_errors_is_cut_and_does_not_hide_the_next() -> None:
    clock = Clock()
    told = Told(clock)
    assert sum(told.is_news(f"error {number}") for number in range(2 * TOLD_MAX)) == TOLD_MAX
    clock.seconds = AGAIN_SECONDS
    assert told.is_news("error of the next outage")


def test_an_image_that_cannot_be_closed_is_an_event(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    qcow2.create(path, size=MIB)
    with Daemon(path, f"--control={path}.control") as daemon, FrontEnd(daemon.socket_path) as guest:
        with Control(f"{path}.control") as control:
            control.subscribe("error")
            guest.write(0, b"a" * CLUSTER)
            guest.flush()
            fail_a_metadata_write(daemon, guest)
            guest.stop_queue()
            heard = ""
            while "cannot be closed cleanly, and is kept" not in heard:
                event = control.next_event(TIMEOUT)
                assert event is not None, heard
                heard += event.data["message"]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    path = tmp_path / "sound"
    qcow2.create(path, size=MIB)
    with serve(path) as served:
        yield served


def test_ring_that_breaks_again_and_again_is_told_once(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    err = os.eventfd(0)
    with FrontEnd(served.socket_path) as guest:
        guest.tell(SET_VRING_ERR, struct.pack("<Q", 0), fds=(err,))
        queue = guest.queues[0]
        for _ in range(20):
            queue.bytes[queue.driver_ring + 4 : queue.driver_ring + 4 + 2 * QUEUE_SIZE] = b"\xff" * 2 * QUEUE_SIZE
            queue.available_index[0] += 1
            os.eventfd_write(queue.kick, 1)
            assert os.eventfd_read(err) == 1
            guest.start_queue(guest.stop_queue())
    os.close(err)
    assert caplog.messages == ["queue 0 stopped: a head is past the end of the descriptor table"]


def test_ring_that_is_none_again_and_again_is_told_once(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with FrontEnd(served.socket_path) as guest:
        guest.stop_queue()
        for _ in range(20):
            guest.tell(SET_VRING_NUM, struct.pack("<II", 0, 3))
            guest.stop_queue()
            guest._send(SET_VRING_KICK, struct.pack("<Q", 0), fds=(guest.kick,))
            guest.read_config()
    assert len(caplog.messages) == 1


def test_front_ends_that_do_the_same_wrong_are_told_once(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(20):
        with FrontEnd(served.socket_path) as guest:
            guest._send(99, b"")
            with pytest.raises(BackendGone):
                guest.read_config()
    assert caplog.messages == ["connection closed: request 99 is unknown or was not negotiated"]
