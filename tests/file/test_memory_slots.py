"""Memory that is added and taken away through the socket while requests are in flight."""

import contextlib
import errno
import gc
import mmap
import os
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

import qcow2
from tests.frontend import (
    ADD_MEM_REG,
    GUEST_ADDRESS,
    IN,
    OK,
    OUT,
    REM_MEM_REG,
    SET_MEM_TABLE,
    USER_ADDRESS,
    ZONE,
    FrontEnd,
)
from tests.served import Served, serve
from tests.slowdisk import WRITE, SlowDisk
from vhost import frozen
from vhost.frozen import CHUNK, MOST_BYTES, WINDOW
from vhost.jobcommands import JobCommands
from vhost.jobs import Jobs

SLOT = 1 << 20
READ = 64 << 10
WINDOW_BYTES = WINDOW * CHUNK


class Dimm:
    """A piece of memory behind all the guest has; a context manager."""

    def __init__(self, number: int) -> None:
        self.start = ZONE + number * SLOT  # from where the guest's memory begins
        self.fd = os.memfd_create("dimm", os.MFD_CLOEXEC)
        os.truncate(self.fd, SLOT)
        self.bytes = mmap.mmap(self.fd, SLOT)

    def __enter__(self) -> "Dimm":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.bytes.close()
        os.close(self.fd)

    @property
    def region(self) -> bytes:
        return struct.pack("<QQQQ", GUEST_ADDRESS + self.start, SLOT, USER_ADDRESS + self.start, 0)


def read_all(guest: FrontEnd, dimm: Dimm) -> None:
    """Ask for the whole disk, to be put into *dimm*."""
    for start in range(0, SLOT, READ):
        guest.queues[0].submit(IN, start, nbytes=READ, place=dimm.start + start)


def wait_for_fetched(served: Served, count: int) -> None:
    while served.device.worker.counters.requests < count:
        served.device.worker.call(lambda: None)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(SLOT))
    return path


@pytest.fixture
def served(disk: Path) -> Iterator[Served]:
    with serve(disk, format="raw") as it:
        yield it


def dimms_mapped() -> int:
    """By us and by the device, which lives in this process."""
    return Path("/proc/self/maps").read_text().count("memfd:dimm")


def test_memory_is_written_to_the_last_byte_when_its_removal_is_acknowledged(served: Served, disk: Path) -> None:
    content = disk.read_bytes()
    with FrontEnd(served.socket_path) as guest:
        for turn in range(40):
            with Dimm(turn % 3) as dimm:
                guest.tell(ADD_MEM_REG, bytes(8) + dimm.region, fds=(dimm.fd,))
                read_all(guest, dimm)
                wait_for_fetched(served, (turn + 1) * SLOT // READ)
                guest.tell(REM_MEM_REG, bytes(8) + dimm.region)
                assert dimm.bytes[:] == content
                assert [done.status for done in guest.reap()] == [OK] * (SLOT // READ)
                assert dimms_mapped() == 1


def test_other_memory_comes_and_goes_beside_requests_in_flight(served: Served, disk: Path) -> None:
    content = disk.read_bytes()
    with FrontEnd(served.socket_path) as guest, Dimm(0) as used, Dimm(1) as other:
        guest.tell(ADD_MEM_REG, bytes(8) + used.region, fds=(used.fd,))
        answered = 0
        for _turn in range(40):
            read_all(guest, used)
            guest.tell(ADD_MEM_REG, bytes(8) + other.region, fds=(other.fd,))
            guest.tell(REM_MEM_REG, bytes(8) + other.region)
            while answered < SLOT // READ:
                done = guest.wait()
                assert {completion.status for completion in done} == {OK}
                answered += len(done)
            answered = 0
            assert used.bytes[:] == content
            used.bytes[:] = bytes(SLOT)


def test_whole_table_is_replaced_beside_requests_in_flight(served: Served, disk: Path) -> None:
    content = disk.read_bytes()
    with FrontEnd(served.socket_path) as guest, Dimm(0) as dimm:
        own = struct.pack("<QQQQ", GUEST_ADDRESS, len(guest.memory), USER_ADDRESS, 0)
        table = struct.pack("<II", 2, 0) + own + dimm.region
        guest.tell(SET_MEM_TABLE, table, fds=(guest.memory_fd, dimm.fd))
        answered = 0
        for _turn in range(20):
            read_all(guest, dimm)
            guest.tell(SET_MEM_TABLE, table, fds=(guest.memory_fd, dimm.fd))  # rings and buffers move along
            while answered < SLOT // READ:
                answered += len(guest.wait())
            answered = 0
            assert dimm.bytes[:] == content
            dimm.bytes[:] = bytes(SLOT)


def test_memory_goes_though_a_backup_keeps_the_write_from_it_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backing, mount_point, disk = tmp_path / "backing", tmp_path / "slow", tmp_path / "disk.raw"
    backing.mkdir()
    mount_point.mkdir()
    nwindows = MOST_BYTES // WINDOW_BYTES + 40
    disk.write_bytes(b"d" * nwindows * WINDOW_BYTES)
    (backing / "copy").touch()
    with SlowDisk(backing, mount_point) as slow, serve(disk, format="raw") as served, Dimm(0) as dimm:
        with Jobs(served.device, served.backend, lambda report: None) as jobs, FrontEnd(served.socket_path) as guest:
            guest.tell(ADD_MEM_REG, bytes(8) + dimm.region, fds=(dimm.fd,))
            with slow.holding(WRITE):
                commands = JobCommands(served.device, served.backend, served.held, jobs)
                commands.backup(str(mount_point / "copy"), format="raw", existing=True)
                slow.wait_for_one()
                answered = 0
                for window in range(nwindows):
                    while not guest.queues[0].free:
                        answered += len(guest.wait())
                    guest.queues[0].submit_from(OUT, window * WINDOW_BYTES, dimm.start, WINDOW_BYTES)
                wait_for_fetched(served, nwindows)
                monkeypatch.setattr(frozen, "PATIENCE_SECONDS", 0.0)
                guest.tell(REM_MEM_REG, bytes(8) + dimm.region)
                while answered < nwindows:
                    answered += len(guest.wait())


def test_memory_that_changes_for_ever_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    qcow2.create(path, size=1 << 20)

    def change(guest: FrontEnd, count: int) -> int:
        """The memory that this process has after so many more tables, each with a file that was never in one."""
        for _ in range(count):
            other = os.memfd_create("other")
            os.ftruncate(other, 4096)
            first = struct.pack("<QQQQ", GUEST_ADDRESS, len(guest.memory), USER_ADDRESS, 0)
            table = struct.pack("<II", 2, 0) + first + struct.pack("<QQQQ", 0, 4096, 0, 0)
            guest.tell(SET_MEM_TABLE, table, fds=(guest.memory_fd, other))
            os.close(other)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    with serve(path) as served, FrontEnd(served.socket_path) as guest:
        tracemalloc.start()
        try:
            before = change(guest, 1500)
            assert change(guest, 1500) - before < 32 * 1024
        finally:
            tracemalloc.stop()
        assert guest.read(0, 512) == bytes(512)


def test_memory_whose_file_cannot_be_written_is_mapped_and_given_back(tmp_path: Path) -> None:
    """Whoever closes a descriptor of it is told what the host could not write of it."""
    path = tmp_path / "disk"
    qcow2.create(path, size=1 << 20)
    for name in ("backing", "mount"):
        (tmp_path / name).mkdir()
    (tmp_path / "backing" / "memory").write_bytes(bytes(4096))
    with SlowDisk(tmp_path / "backing", tmp_path / "mount") as slow, serve(path) as served:
        fd = os.open(slow.path / "memory", os.O_RDWR | os.O_CLOEXEC)
        with FrontEnd(served.socket_path) as guest, mmap.mmap(fd, 4096) as memory, slow.failing(errno.EIO):
            memory[0] = 1
            for start in (0, 4096):
                region = struct.pack("<QQQQQ", 0, start, 4096, start, 0)
                guest.tell(ADD_MEM_REG, region, fds=(fd,))
                memory[0] += 1
            guest.stop_queue()
        with contextlib.suppress(OSError):
            os.close(fd)
