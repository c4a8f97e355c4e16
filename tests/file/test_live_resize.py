"""A disk that grows while a front-end uses it, and how the front-end learns of it."""

import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.frontend import (
    CONFIG_CHANGE_MSG,
    F_CONFIG_WCE,
    F_FLUSH,
    IN,
    IOERR,
    NEED_REPLY,
    OK,
    OUT,
    REPLY,
    VERSION,
    FrontEnd,
)
from tests.program import qcow2_tool_ok
from tests.served import Served, serve
from vhost.device import ResizeRefused

OLD, NEW = 4 << 20, 1 << 30
HEADER = struct.Struct("<III")
TOLD = HEADER.pack(CONFIG_CHANGE_MSG, VERSION | NEED_REPLY, 0)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qcow2_tool_ok("create", "-o", "compat=1.1,lazy_refcounts=on", path, str(OLD))
    return path


@pytest.fixture
def served(image: Path) -> Iterator[Served]:
    with serve(image) as it:
        yield it
    assert "No errors" in qcow2_tool_ok("check", image)


def exactly(channel: socket.socket, nbytes: int) -> bytes:
    return channel.recv(nbytes, socket.MSG_WAITALL)


def channel_of(guest: FrontEnd) -> socket.socket:
    """A back-end channel on which nothing is to be told yet."""
    assert guest.size == OLD
    return guest.open_backend_channel()


def acknowledge(channel: socket.socket, times: int = 1) -> None:
    channel.sendall(times * (HEADER.pack(CONFIG_CHANGE_MSG, VERSION | REPLY, 8) + bytes(8)))


def test_front_end_is_told_and_may_ask_before_it_acknowledges(served: Served) -> None:
    with FrontEnd(served.socket_path) as guest, channel_of(guest) as channel:
        served.device.resize(NEW)
        assert exactly(channel, 12) == TOLD
        assert guest.size == NEW  # as QEMU does: a question on the other channel, from within its handler
        acknowledge(channel)
        guest.write(NEW - 4096, b"\x5a" * 4096)
        assert guest.read(NEW - 4096, 4096) == b"\x5a" * 4096
        assert guest.read(OLD, 4096) == bytes(4096)


def flood(channel: socket.socket) -> None:
    """Acknowledge until it is closed."""
    with suppress(BrokenPipeError, ConnectionResetError):
        while True:
            acknowledge(channel, times=1000)


def test_acknowledgements_that_nobody_asked_for_keep_nobody_waiting(image: Path) -> None:
    """Not the front-end that sends them, and not the daemon from its end."""
    with ExitStack() as stack:
        with serve(image) as served:
            guest = stack.enter_context(FrontEnd(served.socket_path))
            channel = stack.enter_context(channel_of(guest))
            flooding = threading.Thread(target=flood, args=(channel,))
            flooding.start()
            stack.callback(flooding.join)
            for _ in range(1000):
                guest.read_config()
            served.device.resize(NEW)
            assert exactly(channel, 12) == TOLD
            assert guest.size == NEW


def test_new_size_is_there_at_the_next_open(served: Served, image: Path) -> None:
    served.device.resize(NEW)
    with FrontEnd(served.socket_path) as guest:
        assert guest.size == NEW
    assert f"({NEW} bytes)" in qcow2_tool_ok("info", "-U", image)


def test_requests_under_way_while_it_grows_are_all_answered(served: Served) -> None:
    with FrontEnd(served.socket_path) as guest:
        resizing = threading.Thread(target=lambda: [served.device.resize(OLD << shift) for shift in range(1, 8)])
        for slot in range(64):
            guest.submit(OUT, slot << 16, bytes([slot + 1]) * 65536)
        resizing.start()
        done = []
        while len(done) < 64:
            done += guest.wait()
        resizing.join()
        assert {completion.status for completion in done} == {OK}
        for slot in range(64):
            assert guest.read(slot << 16, 65536) == bytes([slot + 1]) * 65536
        assert guest.size == OLD << 7


def test_front_end_without_the_channel_goes_on(served: Served) -> None:
    with FrontEnd(served.socket_path) as guest:
        served.device.resize(NEW)
        guest.write(NEW - 512, bytes(range(256)) * 2)


def test_channel_that_the_front_end_closed_is_no_harm(served: Served) -> None:
    with FrontEnd(served.socket_path) as guest:
        channel_of(guest).close()
        served.device.resize(NEW)
        assert guest.size == NEW


def test_channel_is_closed_when_the_front_end_leaves(served: Served) -> None:
    open_fds = []
    for _visit in range(3):  # the daemon lets the next one in when it is done with the one before
        with FrontEnd(served.socket_path) as guest:
            channel = channel_of(guest)
            open_fds.append(len(os.listdir("/proc/self/fd")))
        with channel:
            assert exactly(channel, 1) == b""
    assert len(set(open_fds)) == 1


def test_second_channel_replaces_the_first(served: Served) -> None:
    with FrontEnd(served.socket_path) as guest, ExitStack() as stack:
        first, second = (stack.enter_context(channel_of(guest)) for _ in range(2))
        assert exactly(first, 1) == b""
        served.device.resize(NEW)
        assert exactly(second, 12)[:4] == HEADER.pack(CONFIG_CHANGE_MSG, 0, 0)[:4]


def test_nonsense_on_the_channel_ends_the_connection(served: Served) -> None:
    with FrontEnd(served.socket_path) as guest, channel_of(guest) as channel:
        channel.sendall(HEADER.pack(7, VERSION | REPLY, 8) + bytes(8))
        assert exactly(channel, 1) == b""


REFUSALS = {
    "shrinking": (OLD - 512, "can only grow"),
    "more than tables can map": (1 << 62, "L1 table"),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_impossible_size_is_refused_on_one_line_and_the_disk_goes_on(served: Served, image: Path, why: str) -> None:
    nbytes, reason = REFUSALS[why]
    with FrontEnd(served.socket_path) as guest:
        with pytest.raises(ResizeRefused, match=reason) as refusal:
            served.device.resize(nbytes)
        assert str(refusal.value).startswith(str(image))
        assert "\n" not in str(refusal.value)
        assert guest.size == OLD
        guest.write(0, bytes(512))
        assert guest.do(IN, OLD, nbytes=512).status == IOERR


def test_disk_that_is_served_read_only_is_not_resized(image: Path) -> None:
    with serve(image, writable=False) as served, pytest.raises(ResizeRefused, match="read-only"):
        served.device.resize(NEW)


def test_raw_disk_grows_too(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(OLD))
    with serve(path, format="raw") as served, FrontEnd(served.socket_path) as guest:
        with pytest.raises(ResizeRefused, match="can only grow"):
            served.device.resize(OLD - 512)
        served.device.resize(2 * OLD)
        assert guest.size == 2 * OLD
        guest.write(2 * OLD - 512, b"\xa5" * 512)
        guest.flush()
        assert path.stat().st_size == 2 * OLD
        assert path.read_bytes()[-512:] == b"\xa5" * 512


def test_raw_disk_has_whole_sectors_whatever_its_file_has(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(OLD))
    with serve(path, format="raw") as served, FrontEnd(served.socket_path) as guest:
        served.device.resize(OLD + 100)
        assert (guest.size, path.stat().st_size) == (OLD + 512, OLD + 100)
        assert guest.read(OLD, 512) == bytes(512)
        guest.write(OLD, b"\xa5" * 512)
        guest.flush()
    assert path.read_bytes()[OLD:] == b"\xa5" * 512


def test_disk_that_is_paused_may_be_resized_while_its_cache_is_switched(image: Path) -> None:
    """Nobody holds the image then, but for the moments in which it grows."""
    with serve(image) as served, FrontEnd(served.socket_path, features=F_FLUSH | F_CONFIG_WCE) as guest:
        guest.stop_queue()
        grower = threading.Thread(target=lambda: [served.device.resize(OLD + (n << 20)) for n in range(40)])
        grower.start()
        while grower.is_alive():
            guest.set_writeback(False)
            guest.set_writeback(True)
        grower.join()
        assert guest.size == OLD + (39 << 20)


@pytest.mark.parametrize("size", [(1 << 63) - 1, (1 << 63) - 512, (1 << 62)])
def test_size_that_no_file_has_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(bytes(4096))
    with serve(path, format="raw") as served, FrontEnd(served.socket_path) as guest:
        with pytest.raises(ResizeRefused):
            served.device.resize(size)
        assert guest.size == 4096
        guest.write(0, b"1" * 512)
