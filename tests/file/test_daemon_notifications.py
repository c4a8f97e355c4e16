"""Kick and call fds are files that the front-end shares with the daemon, and may do with as it likes."""

import contextlib
import os
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.frontend import (
    ADD_MEM_REG,
    GET_FEATURES,
    IN,
    NEED_REPLY,
    OK,
    SET_BACKEND_REQ_FD,
    SET_VRING_CALL,
    SET_VRING_KICK,
    VERSION,
    FrontEnd,
)
from tests.program import Daemon

AIO = pytest.mark.parametrize("aio", [(), ("--aio=threads",)], ids=["auto", "threads"])
FULL = (1 << 64) - 2  # what an eventfd counts to before a write to it waits
KICKS = 2_000_000
ROUNDS = 200
NOISE_KIB = 1024  # of memory, an allocator's
FLOOD = f"""
import os, sys
kicks = [int(fd) for fd in sys.argv[1:]]
for _ in range({KICKS} // len(kicks)):
    for kick in kicks:
        os.eventfd_write(kick, 1)
print("done", flush=True)
while True:
    for kick in kicks:
        os.eventfd_write(kick, 1)
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"intact\n".ljust(1 << 20, b"\0"))
    return path


def serve(image: Path, aio: Sequence[str]) -> Daemon:
    return Daemon(image, "--format=raw", *aio)


@contextmanager
def flood(kicks: Sequence[int]) -> Iterator[Callable[[], bool]]:
    """Kick without end from another process -> whether it has kicked KICKS times by now."""
    command = [sys.executable, "-c", FLOOD, *map(str, kicks)]
    with subprocess.Popen(command, pass_fds=kicks, stdout=subprocess.PIPE) as flooder:
        assert flooder.stdout is not None
        try:
            yield lambda: bool(select.select([flooder.stdout], [], [], 0)[0])
            assert flooder.poll() is None
        finally:
            flooder.kill()


def anonymous_kib(daemon: Daemon) -> int:
    """The daemon's own memory."""
    for line in Path(f"/proc/{daemon.process.pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    raise AssertionError("no RssAnon")


def read_from(guest: FrontEnd, index: int) -> None:
    """Read the beginning of the disk through one queue."""
    guest.queues[index].submit(IN, 0, nbytes=512)
    while not (done := list(guest.queues[index].reap())):
        guest.wait_for_call()
    assert [(one.status, one.data[:6]) for one in done] == [(OK, b"intact")]


@pytest.mark.sample(1)
@AIO
@pytest.mark.parametrize("flooded", [1, 96])
def test_flood_of_kicks_delays_nobody_for_long_and_leaves_nothing(
    image: Path, aio: Sequence[str], flooded: int
) -> None:
    with serve(image, aio) as daemon, FrontEnd(daemon.socket_path, queues=flooded + 1) as guest:
        read_from(guest, flooded)
        before = anonymous_kib(daemon)
        rounds = 0
        with flood([queue.kick for queue in guest.queues[:flooded]]) as is_over:
            while rounds < ROUNDS or not is_over():
                read_from(guest, flooded)
                guest.ask(GET_FEATURES)
                rounds += 1
            assert guest.stop_queue(flooded) == rounds + 1
            assert anonymous_kib(daemon) - before < NOISE_KIB
        print(f"{rounds} rounds, {anonymous_kib(daemon) - before} KiB more")
        for index in range(flooded):
            read_from(guest, index)
        guest.socket.close()
        daemon.stop()


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


@contextmanager
def lingering() -> Iterator[int]:
    """A socket that the last one to close it waits an hour for: nobody reads what is in it."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        with server.accept()[0]:
            sender.setblocking(False)
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3600))
            with contextlib.suppress(BlockingIOError):
                while sender.send(bytes(1 << 20)):
                    pass
            yield sender.detach()


@AIO
@pytest.mark.parametrize(
    ("request_number", "payload"),
    [
        (SET_VRING_KICK, struct.pack("<Q", 0)),
        (SET_VRING_CALL, struct.pack("<Q", 0)),
        (ADD_MEM_REG, struct.pack("<QQQQQ", 0, 0, 4096, 0, 0)),
        (SET_BACKEND_REQ_FD, b""),
        (GET_FEATURES, b""),
    ],
    ids=["kick", "call", "memory", "channel", "nothing"],
)
def test_socket_that_lingers_keeps_nobody_waiting(
    image: Path, aio: Sequence[str], request_number: int, payload: bytes
) -> None:
    with serve(image, aio) as daemon, lingering() as fd:
        with FrontEnd(daemon.socket_path) as hostile, FrontEnd(daemon.socket_path, connect=False) as guest:
            hostile._send(request_number, payload, fds=(fd,), flags=VERSION | NEED_REPLY)
            os.close(fd)  # by the time the daemon closes its own it is the last
            hostile.socket.close()
            guest.connect(daemon.socket_path)
            read_from(guest, 0)
        daemon.stop()
