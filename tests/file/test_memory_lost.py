"""Shared memory that goes away under the daemon: the ring that meets it breaks, all else goes on."""

import os
import select
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ring.build import FLAGS, ROOT
from tests.builder import Recipe, build
from tests.frontend import (
    ADD_MEM_REG,
    DISCARD,
    GUEST_ADDRESS,
    IN,
    OK,
    OUT,
    USER_ADDRESS,
    WRITABLE,
    Completion,
    FrontEnd,
)
from tests.inflightmodel import SplitModel
from tests.patience import TIMEOUT
from tests.program import Daemon, qcow2_tool_ok

SET_VRING_ERR = 14
PAGE = 4096
WRITTEN = b"w" * 512
DIMM = 0x9000_0000  # where a second region lies, for the guest


class Guest(FrontEnd):
    """Two queues with an err fd, and a page of memory of its own that it may take away."""

    is_lost = False

    def __init__(self, socket_path: Path, *, inflight: bool = False, connect: bool = True) -> None:
        self.errs = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]
        self.dimm = os.memfd_create("dimm", os.MFD_CLOEXEC)
        os.truncate(self.dimm, PAGE)
        super().__init__(socket_path, queues=2, inflight=inflight, connect=connect)

    def start_queue(self, base: int, index: int = 0) -> None:
        self.tell(SET_VRING_ERR, struct.pack("<Q", index), fds=(self.errs[index],))
        if index == 0:
            region = struct.pack("<QQQQ", DIMM, PAGE, USER_ADDRESS + (1 << 40), 0)
            os.truncate(self.dimm, PAGE)
            self.tell(ADD_MEM_REG, bytes(8) + region, fds=(self.dimm,))
            if self.is_lost:
                self.lose()
        super().start_queue(base, index)

    def close(self) -> None:
        super().close()
        for fd in (*self.errs, self.dimm):
            os.close(fd)

    def lose(self) -> None:
        """Take the page away; it can be mapped again, and is taken away again then."""
        os.truncate(self.dimm, 0)
        self.is_lost = True

    def post(self, kind: int, index: int = 0, **at: int) -> int:
        """A request of one sector, of which *at* names parts that lie in the page: header, data or status. Its slot."""
        queue = self.queues[index]
        slot = queue.free.pop()
        header, data, status = queue._header_at(slot), queue._data_at(slot), queue._status_at(slot)
        self.bytes[header : header + 16] = struct.pack("<IIQ", kind, 0, 0)
        self.bytes[data : data + 512] = WRITTEN
        self.bytes[status] = 0xFF
        chain = [(header, 16, 0), (data, 512, WRITABLE if kind == IN else 0), (status, 1, WRITABLE)]
        for part in at:
            place = ("header", "data", "status").index(part)
            chain[place] = (DIMM - GUEST_ADDRESS + at[part], *chain[place][1:])
        queue._publish(slot, chain)
        return slot

    def wait_until_broken(self) -> None:
        assert select.select(self.errs[:1], [], [], TIMEOUT)[0]

    def read_beside(self) -> None:
        """The other queue goes on."""
        self.queues[1].submit(IN, 0, nbytes=512)
        assert self.wait_beside().status == OK

    def wait_beside(self) -> Completion:
        """The one answer that the other queue is to have."""
        queue = self.queues[1]
        while not (done := list(queue.reap())):
            assert select.select([queue.call], [], [], TIMEOUT)[0]
            os.eventfd_read(queue.call)
        (one,) = done
        return one


@pytest.fixture(params=["raw", "fresh", "overlay"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "a"
    if request.param == "raw":
        path.write_bytes(bytes(1 << 20))
    elif request.param == "fresh":
        build(Recipe(size=1 << 20), path)
    else:
        (tmp_path / "base").write_bytes(b"\x11" * (1 << 20))
        qcow2_tool_ok("create", "-b", tmp_path / "base", "-F", "raw", path)
    return path


@pytest.fixture
def daemon(image: Path) -> Iterator[Daemon]:
    options = ["--format=raw"] if image.stat().st_size == 1 << 20 else []
    with Daemon(image, *options) as daemon:
        yield daemon
        daemon.stop()


PARTS = {
    "the header of a write": (OUT, "header"),
    "the data of a write": (OUT, "data"),
    "the status of a write": (OUT, "status"),
    "the header of a read": (IN, "header"),
    "the data of a read": (IN, "data"),
    "the status of a read": (IN, "status"),
    "the segment of a discard": (DISCARD, "data"),
}


@pytest.mark.parametrize("name", PARTS)
def test_request_whose_memory_is_gone_changes_nothing(daemon: Daemon, name: str) -> None:
    kind, part = PARTS[name]
    with Guest(daemon.socket_path) as guest:
        before = guest.read(0, PAGE)
        guest.lose()
        slot = guest.post(kind, **{part: 0})
        if part == "data":  # which the kernel may have met, rather than we
            (done,) = guest.wait()
            assert done.slot == slot
            assert done.status != OK or kind == IN
        else:
            guest.wait_until_broken()
        guest.read_beside()
    with FrontEnd(daemon.socket_path) as other:
        written = WRITTEN if name == "the status of a write" else before[:512]
        assert other.read(0, PAGE) == written + before[512:]
        other.write(0, b"2" * 512)


@pytest.mark.parametrize("kind", ["the first to be met", "zeros by now"])
@pytest.mark.parametrize("option", ["--cache=none", "--cache=writeback"])
@pytest.mark.parametrize("part", ["data", "header"])
def test_zeros_that_were_never_there_reach_no_image(image: Path, kind: str, option: str, part: str) -> None:
    """Data at an odd address is copied for O_DIRECT; once a page is replaced, the kernel would take it as well."""
    options = ["--format=raw"] if image.stat().st_size == 1 << 20 else []
    with Daemon(image, option, *options) as daemon:
        with Guest(daemon.socket_path) as guest:
            guest.write(0, b"o" * PAGE)
            guest.lose()
            if kind == "zeros by now":
                guest.post(OUT, header=0)
                guest.wait_until_broken()
            guest.post(OUT, 1, **{part: 1})
            assert guest.wait_beside().status != OK
            if kind == "zeros by now":
                guest.read_beside()
        with FrontEnd(daemon.socket_path) as other:
            assert other.read(0, PAGE) == b"o" * PAGE
            other.write(0, b"2" * 512)
        daemon.stop()


def test_ring_whose_memory_is_gone_breaks(daemon: Daemon) -> None:
    with Guest(daemon.socket_path) as guest:
        os.truncate(guest.memory_fd, 0)  # and from here on it is not touched here, either
        os.eventfd_write(guest.kick, 1)
        guest.wait_until_broken()
        guest.read_config()
    with FrontEnd(daemon.socket_path) as other:
        other.write(0, b"2" * 512)


def test_next_daemon_meets_the_same_request_and_lives(image: Path) -> None:
    options = ["--format=raw"] if image.stat().st_size == 1 << 20 else []
    with Daemon(image, *options) as first, Guest(first.socket_path, inflight=True) as guest:
        guest.write(0, b"1" * 512)
        first.kill()
        guest.post(OUT, header=0)
        guest.lose()
        with Daemon(image, *options) as second:
            guest.connect(second.socket_path)
            guest.read_beside()
            second.stop()


@pytest.mark.parametrize("image", ["raw"], indirect=True)
def test_in_flight_region_that_is_gone_breaks_its_ring(daemon: Daemon) -> None:
    with Guest(Path(), connect=False) as guest:
        model = SplitModel(guest)
        guest.inflight_payload = struct.pack("<QQHH4x", model.region.nbytes, 0, 1, 0)
        guest.connect(daemon.socket_path)
        os.truncate(model.region.fd, 0)
        guest.post(IN)
        guest.wait_until_broken()
        guest.read_beside()


def test_no_byte_beside_the_mapping_is_replaced(tmp_path: Path) -> None:
    compiler, program = shutil.which("gcc"), tmp_path / "lost_page"
    assert compiler is not None
    sources = [ROOT / "tests/c/lost_page.c", ROOT / "ring/loss.c", ROOT / "ring/memory.c"]
    subprocess.run([compiler, *FLAGS, f"-I{ROOT}", *sources, "-pthread", "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
