"""Front-ends that send garbage lose their connection; the daemon goes on, with nothing left over."""

import os
import random
import resource
import socket
import struct
from collections.abc import Iterator

import pytest

from tests.frontend import SET_INFLIGHT_FD, BackendGone, FrontEnd
from tests.patience import TIMEOUT
from tests.program import Daemon

pytestmark = pytest.mark.xdist_group("daemon garbage")  # one daemon outlives it all

VERSION = 1
# request, payload, fds: each shape that the protocol knows, from the specification
MESSAGES = [
    (1, b"", 0),  # GET_FEATURES
    (2, struct.pack("=Q", 1 << 30), 0),
    (3, b"", 0),
    (5, struct.pack("=IIQQQQ", 1, 0, 0, 1 << 20, 0x10000, 0), 1),
    (8, struct.pack("=II", 0, 128), 0),
    (9, struct.pack("=IIQQQQ", 0, 0, 0x10000, 0x12000, 0x11000, 0), 0),
    (10, struct.pack("=II", 0, 0), 0),
    (11, struct.pack("=II", 0, 0), 0),
    (12, struct.pack("=Q", 0), 1),
    (13, struct.pack("=Q", 0), 1),
    (14, struct.pack("=Q", 0), 1),
    (15, b"", 0),
    (16, struct.pack("=Q", 1 << 3 | 1 << 9), 0),
    (17, b"", 0),
    (18, struct.pack("=II", 0, 1), 0),
    (24, struct.pack("=III", 0, 57, 0) + bytes(57), 0),
    (25, struct.pack("=III", 32, 1, 0) + b"\1", 0),
    (37, struct.pack("=QQQQQ", 0, 0, 1 << 20, 0x10000, 0), 1),
    (38, struct.pack("=QQQQQ", 0, 0, 1 << 20, 0x10000, 0), 0),
    (39, struct.pack("=Q", 1), 0),
]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for the whole file: whatever a test sends, the next one must find it well."""
    image = tmp_path_factory.mktemp("garbage") / "disk.raw"
    image.write_bytes(b"intact\n".ljust(1 << 20, b"\0"))
    with Daemon(image, "--format=raw") as running:
        yield running
        running.stop()


@pytest.fixture(autouse=True)
def unharmed(daemon: Daemon) -> Iterator[None]:
    """Before and after each test: it serves, and holds as many descriptors as before."""
    before = serve_and_count(daemon)
    yield
    assert serve_and_count(daemon) == before


def serve_and_count(daemon: Daemon) -> int:
    with FrontEnd(daemon.socket_path) as guest:  # answered only once the visitor before is forgotten
        assert guest.read(0, 512).startswith(b"intact")
        return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))


def connect(daemon: Daemon) -> socket.socket:
    visitor = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    visitor.settimeout(TIMEOUT)
    visitor.connect(str(daemon.socket_path))
    return visitor


def send(visitor: socket.socket, data: bytes, nfds: int = 0) -> None:
    fds = [os.eventfd(0) for _ in range(nfds)]
    try:
        socket.send_fds(visitor, [data], fds)
    finally:
        for fd in fds:
            os.close(fd)


def message(request: int, payload: bytes, *, flags: int = VERSION) -> bytes:
    return struct.pack("=III", request, flags, len(payload)) + payload


def is_closed(visitor: socket.socket) -> bool:
    """Read until the daemon hangs up; replies on the way are ignored."""
    try:
        while visitor.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


ALL = pytest.mark.parametrize(
    ("request_number", "payload", "nfds"), MESSAGES, ids=[str(request) for request, _, _ in MESSAGES]
)


@ALL
def test_stream_may_end_anywhere(daemon: Daemon, request_number: int, payload: bytes, nfds: int) -> None:
    whole = message(request_number, payload)
    for length in range(1, len(whole)):
        with connect(daemon) as visitor:
            send(visitor, whole[:length], nfds)
            visitor.shutdown(socket.SHUT_WR)
            assert is_closed(visitor)


@ALL
def test_wrong_size_loses_the_connection(daemon: Daemon, request_number: int, payload: bytes, nfds: int) -> None:
    with connect(daemon) as visitor:
        send(visitor, message(request_number, payload + b"\0"), nfds)
        assert is_closed(visitor)


@ALL
def test_too_many_fds_lose_the_connection(daemon: Daemon, request_number: int, payload: bytes, nfds: int) -> None:
    with connect(daemon) as visitor:
        send(visitor, message(request_number, payload), 9)
        assert is_closed(visitor)


@pytest.mark.parametrize("request_number", [0, 6, 31, 44, 0xFFFFFFFF])
def test_unknown_request_loses_the_connection(daemon: Daemon, request_number: int) -> None:
    with connect(daemon) as visitor:
        send(visitor, message(request_number, b""))
        assert is_closed(visitor)


def test_endless_payload_loses_the_connection_at_once(daemon: Daemon) -> None:
    with connect(daemon) as visitor:
        send(visitor, struct.pack("=III", 5, VERSION, 0xFFFFFFFF), 8)
        assert is_closed(visitor)


def test_memory_that_is_no_memory_loses_the_connection(daemon: Daemon) -> None:
    with connect(daemon) as visitor:
        send(visitor, message(5, struct.pack("=IIQQQQ", 1, 0, 0, 1 << 20, 0x10000, 0)), 1)  # an eventfd
        assert is_closed(visitor)


def test_front_end_that_never_reads_loses_the_connection(daemon: Daemon) -> None:
    with connect(daemon) as visitor:
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            visitor.sendall(message(1, b"") * 100_000)


@pytest.mark.parametrize("seed", range(40))
def test_random_messages_lose_the_connection_or_are_answered(daemon: Daemon, seed: int) -> None:
    rng = random.Random(seed)
    with connect(daemon) as visitor:
        try:
            for _ in range(30):
                request, payload, nfds = rng.choice(MESSAGES)
                send(visitor, message(request, corrupt(rng, payload), flags=rng.choice([1, 1, 9])), nfds)
            visitor.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            return
        assert is_closed(visitor)


def corrupt(rng: random.Random, payload: bytes) -> bytes:
    """Change a byte or two, or none."""
    changed = bytearray(payload)
    for _ in range(rng.choice([0, 0, 1, 2])):
        if changed:
            changed[rng.randrange(len(changed))] = rng.choice([0, 1, 2, 0x7F, 0xFF])
    return bytes(changed)


class WithoutQueue(FrontEnd):
    """Stopping one would give descriptors back."""

    def start_queue(self, base: int, index: int = 0) -> None:
        pass


def test_in_flight_region_without_a_descriptor_left_is_closed(daemon: Daemon) -> None:
    """There is one for the message, and none for the copy of it that the daemon wants."""
    pid = daemon.process.pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    with WithoutQueue(daemon.socket_path, inflight=True) as guest:
        taken = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
        free = next(number for number in range(soft) if number not in taken)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (free + 1, hard))
        try:
            with pytest.raises((BackendGone, AssertionError)):
                guest.tell(SET_INFLIGHT_FD, guest.inflight_payload, fds=(guest.inflight_fd,))
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
