"""Storage that hangs holds up those who wait for it, and nobody else."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.driver import DriverMemory, DriverQueue
from tests import slowdisk
from tests.blockguest import FLUSH, IN, MIB, OK, OUT, Guest
from tests.frontend import FrontEnd
from tests.patience import TIMEOUT
from tests.program import qcow2_tool_ok
from tests.served import serve
from tests.slowdisk import SlowDisk
from vhost.device import ResizeRefused


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SlowDisk]:
    backing, mount_point = tmp_path / "backing", tmp_path / "slow"
    backing.mkdir()
    mount_point.mkdir()
    (backing / "disk").write_bytes(bytes(MIB))
    with SlowDisk(backing, mount_point) as disk:
        yield disk


@pytest.fixture
def fd(disk: SlowDisk) -> Iterator[int]:
    fd = os.open(disk.path / "disk", os.O_RDWR | os.O_CLOEXEC)
    yield fd
    os.close(fd)


def test_the_slow_disk_is_a_disk(disk: SlowDisk, fd: int) -> None:
    os.pwrite(fd, b"x" * 4096, 8192)
    os.fdatasync(fd)
    assert (disk.path / "disk").read_bytes() == bytes(8192) + b"x" * 4096 + bytes(MIB - 12288)
    (disk.path / "new").write_bytes(b"y")
    assert os.path.getsize(disk.path / "new") == 1


@pytest.fixture
def guest(fd: int) -> Iterator[Guest]:
    with Guest(fd) as guest:
        yield guest


@pytest.fixture
def other(guest: Guest) -> Iterator[DriverQueue]:
    """Another queue of the same device."""
    with DriverQueue(guest.memory, 128) as queue:
        guest.worker.call(lambda: guest.start_queue(1, queue))
        yield queue


def ask(guest: Guest, queue: DriverQueue, type: int, sector: int, *, data: bytes = b"", room: int = 0) -> int:
    """The status that a request on *queue* is answered with."""
    posted = guest.post(type, sector, data=data, room=room, queue=queue)
    queue.kick()
    return guest.answer(posted, queue.wait()[0]).status


def flush_as_a_lone_writer(guest: Guest) -> None:
    for _ in range(100):
        assert guest.ask(FLUSH).status == OK


REQUESTS = {
    "write": (slowdisk.WRITE, OUT, b"w" * 4096, 0),
    "read": (slowdisk.READ, IN, b"", 4096),
    "sync": (slowdisk.FSYNC, FLUSH, b"", 0),
}


@pytest.mark.parametrize("what", REQUESTS)
def test_a_hanging_transfer_holds_up_no_other_queue_no_command_and_no_drain(
    disk: SlowDisk, guest: Guest, other: DriverQueue, what: str
) -> None:
    opcode, type, data, room = REQUESTS[what]
    flush_as_a_lone_writer(guest)
    with disk.holding(opcode):
        hanging = guest.post(type, 0 if type == FLUSH else 1024, data=data, room=room)
        guest.queue.kick()
        disk.wait_for_one()
        if type == IN:
            assert ask(guest, other, OUT, 0, data=b"o" * 4096) == OK
        else:
            assert ask(guest, other, IN, 0, room=4096) == OK
        guest.worker.call(lambda: None)
        guest.disable(1)
        assert guest.drain(1) > 0
        assert guest.queue.poll() is None
    assert guest.answer(hanging, guest.queue.wait()[0]).status == OK


def test_nothing_of_a_slow_disk_is_done_on_the_workers_thread(guest: Guest) -> None:
    flush_as_a_lone_writer(guest)
    guest.ask(OUT, 0, data=b"w" * 512)
    guest.ask(IN, 0, room=512)
    assert not guest.worker.call(lambda: guest.worker.write_at_once(guest.slot, 0, [b"x"]))
    assert (guest.counters.immediate, guest.counters.immediate_syncs) == (0, 0)


def test_zeros_are_written_without_asking_a_slow_disk_for_its_length(tmp_path: Path) -> None:
    backing, mount_point = tmp_path / "backing", tmp_path / "slow"
    backing.mkdir()
    mount_point.mkdir()
    (backing / "disk").write_bytes(b"x" * 8192)
    with SlowDisk(backing, mount_point, lacks=[slowdisk.FALLOCATE]) as disk:
        fd = os.open(disk.path / "disk", os.O_RDWR | os.O_CLOEXEC)
        with Guest(fd) as guest:
            zeroed = threading.Event()
            with disk.holding(slowdisk.GETATTR):
                guest.worker.call(lambda: guest.worker.zero(guest.slot, 4096, 65536, lambda _: zeroed.set()))
                assert zeroed.wait(TIMEOUT)
            assert os.fstat(fd).st_size == 8192
        os.close(fd)
    assert (backing / "disk").read_bytes() == b"x" * 4096 + bytes(4096)


def test_a_near_disk_is_synced_at_once_only_while_one_queue_is_in_use(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "near", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    os.truncate(fd, MIB)
    with Guest(fd) as guest, DriverQueue(guest.memory, 128) as other:
        guest.worker.call(lambda: guest.start_queue(1, other))
        for _ in range(100):
            assert guest.ask(FLUSH).status == OK
            assert ask(guest, other, IN, 0, room=512) == OK
        assert guest.counters.immediate_syncs == 0
        while not guest.counters.immediate_syncs:
            assert guest.ask(FLUSH).status == OK
    os.close(fd)


def test_a_resize_does_not_wait_for_ever_while_everybody_waits_for_it(disk: SlowDisk, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.symlink_to(disk.path / "image")
    qcow2_tool_ok("create", disk.path / "image", str(64 * MIB))
    with serve(path) as served, FrontEnd(served.socket_path) as guest:
        guest.write(0, b"old" * 1024 + bytes(1024))
        with disk.holding(slowdisk.FSYNC):
            guest.submit(FLUSH)
            disk.wait_for_one()
            with pytest.raises(ResizeRefused, match="have not ended within 0 s"):
                served.device.resize(128 * MIB, patience=0)
            assert guest.read(0, 3072) == b"old" * 1024
        assert [answer.status for answer in guest.wait()] == [OK]
        served.device.resize(128 * MIB, patience=3600)
        guest.write(127 * MIB, b"new!" * 128)


def test_memory_goes_while_a_hanging_transfer_uses_other_memory(disk: SlowDisk, guest: Guest) -> None:
    """What uses the memory that goes is waited for, however long it takes: the disk may still write there."""
    with disk.holding(slowdisk.READ), DriverMemory(4096, guest_address=1 << 32) as other:
        hanging = guest.post(IN, 1024, room=4096)
        guest.queue.kick()
        disk.wait_for_one()
        guest.worker.call(lambda: guest.worker.set_memory([*guest.regions, other.region()]))
        guest.worker.call(lambda: guest.worker.set_memory(guest.regions))
        assert guest.queue.poll() is None
    assert guest.answer(hanging, guest.queue.wait()[0]).status == OK


def test_an_image_that_cannot_grow_for_now_is_read_meanwhile(disk: SlowDisk, tmp_path: Path) -> None:
    path = tmp_path / "image"  # the socket lies beside it
    path.symlink_to(disk.path / "image")
    qcow2_tool_ok("create", disk.path / "image", str(64 * MIB))
    with serve(path) as served, FrontEnd(served.socket_path) as guest:
        guest.write(0, b"old" * 1024 + bytes(1024))
        with disk.holding(slowdisk.SETATTR, slowdisk.FALLOCATE):
            writes = {guest.submit(OUT, (number + 1) * MIB, bytes([number]) * (MIB >> 2)) for number in range(40)}
            disk.wait_for_one()
            answers = []
            read = guest.submit(IN, 0, nbytes=4096)
            while read not in {answer.slot for answer in answers}:
                answers += guest.wait()
            assert len(answers) <= len(writes)
            served.device.worker.call(lambda: None)
        while len(answers) <= len(writes):
            answers += guest.wait()
        assert {answer.status for answer in answers} == {OK}


def test_a_first_write_to_an_overlay_that_hangs_holds_up_no_read(disk: SlowDisk, tmp_path: Path) -> None:
    base, path = tmp_path / "base", tmp_path / "image"
    base.write_bytes(b"b" * MIB)
    path.symlink_to(disk.path / "image")
    qcow2_tool_ok("create", "-o", f"backing_file={base},backing_fmt=raw", disk.path / "image", str(MIB))
    with serve(path) as served, FrontEnd(served.socket_path) as guest:
        guest.write(0, b"old" * 1024 + bytes(1024))
        with disk.holding(slowdisk.WRITE):
            write = guest.submit(OUT, 256 << 10, b"w" * 4096)
            disk.wait_for_one()
            assert guest.read(0, 3072) == b"old" * 1024
            assert guest.read(512 << 10, 4096) == b"b" * 4096
        (answer,) = guest.wait()
        assert (answer.slot, answer.status) == (write, OK)
        assert guest.read(256 << 10, 8192) == b"w" * 4096 + b"b" * 4096
