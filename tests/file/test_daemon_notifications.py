"""Kick and call fds are files that the front-end shares with the daemon, and may do with as it likes."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.frontend import IN, OK, FrontEnd
from tests.program import Daemon

AIO = pytest.mark.parametrize("aio", [(), ("--aio=threads",)], ids=["auto", "threads"])
FULL = (1 << 64) - 2  # what an eventfd counts to before a write to it waits


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"intact\n".ljust(1 << 20, b"\0"))
    return path


def serve(image: Path, aio: Sequence[str]) -> Daemon:
    return Daemon(image, "--format=raw", *aio)


def read_from(guest: FrontEnd, index: int) -> None:
    """Read the beginning of the disk through one queue."""
    guest.queues[index].submit(IN, 0, nbytes=512)
    while not (done := list(guest.queues[index].reap())):
        guest.wait_for_call()
    assert [(one.status, one.data[:6]) for one in done] == [(OK, b"intact")]


def fill(call: int) -> None:
    """Undo what the daemon did to the file: its next write sleeps."""
    os.set_blocking(call, False)
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(call)
    os.eventfd_write(call, FULL)
    os.set_blocking(call, True)


@AIO
def test_call_that_blocks_does_not_keep_a_ring_from_stopping(image: Path, aio: Sequence[str]) -> None:
    with serve(image, aio) as daemon, FrontEnd(daemon.socket_path) as guest:
        fill(guest.queues[0].call)
        guest.submit(IN, 0, nbytes=512)
        assert guest.stop_queue() == 1
        assert [one.status for one in guest.reap()] == [OK]


@AIO
def test_call_that_blocks_does_not_keep_the_next_front_end_waiting(image: Path, aio: Sequence[str]) -> None:
    with serve(image, aio) as daemon:
        with FrontEnd(daemon.socket_path) as hostile, FrontEnd(daemon.socket_path, connect=False) as guest:
            fill(hostile.queues[0].call)
            hostile.submit(IN, 0, nbytes=512)
            hostile.socket.close()
            guest.connect(daemon.socket_path)
            read_from(guest, 0)
        daemon.stop()


@AIO
def test_call_that_blocks_does_not_keep_the_daemon_from_ending(image: Path, aio: Sequence[str]) -> None:
    with serve(image, aio) as daemon, FrontEnd(daemon.socket_path, queues=4) as hostile:
        for queue in hostile.queues:
            fill(queue.call)
            queue.submit(IN, 0, nbytes=512)
        daemon.stop()
