"""O_DIRECT: what bypasses the page cache never meets it in one page, and outlives no lock."""

import fcntl
import os
import random
import struct
from pathlib import Path

import pytest

from qcow2.lock import GUESTS, GUESTS_LIVE, LIVES, OURS, PROCESSES, guest_key
from tests.blockguest import MIB
from tests.forked import fork, status_of
from tests.frontend import ADD_MEM_REG, IN, OUT, BackendGone, FrontEnd
from tests.oracle import assert_not_corrupt, qemu_img
from tests.patience import TIMEOUT
from tests.program import Daemon, qcow2_tool_ok

SIZE = 4 * MIB


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    path.write_bytes(b"b" * SIZE)
    return path


def overlay(base: Path, name: str, cluster_size: int = 65536) -> Path:
    path = base.with_name(name)
    qcow2_tool_ok("create", "-o", f"cluster_size={cluster_size}", "-b", base, "-F", "raw", path, str(SIZE))
    return path


@pytest.mark.sample(4)
@pytest.mark.parametrize("cluster_size", [512, 2048, 4096, 65536])
@pytest.mark.parametrize("cache", ["none", "directsync"])
def test_requests_of_sectors_from_odd_addresses(base: Path, cluster_size: int, cache: str) -> None:
    """Neighbours in one page, buffers at 4 modulo 512: the kernel would fail a later fdatasync, or lose one of them."""
    draw, model = random.Random(cluster_size), bytearray(b"b" * SIZE)
    with Daemon(overlay(base, "disk", cluster_size), f"--cache={cache}") as daemon:
        with FrontEnd(daemon.socket_path) as guest:
            queue = guest.queues[0]
            for turn in range(40):
                flying: dict[int, tuple[int, bytes]] = {}
                for sector in draw.sample(range(64 * (turn % 8), 64 * (turn % 8) + 64), 16):
                    data = draw.randbytes(512)
                    slot = queue.free[-1]
                    at = queue._data_at(slot) + 4 * (turn % 3)
                    queue.bytes[at : at + 512] = data
                    assert queue.submit_from(OUT, sector * 512, at, 512) == slot
                    flying[slot] = sector * 512, data
                while flying:
                    for done in guest.wait():
                        assert done.status == 0
                        where, data = flying.pop(done.slot)
                        model[where : where + 512] = data
                zeroed = draw.randrange(512)
                guest.write_zeroes(zeroed * 512, 1024, unmap=bool(turn % 2))
                model[zeroed * 512 : zeroed * 512 + 1024] = bytes(1024)
                guest.flush()
            assert b"".join(guest.read(at, 131072) for at in range(0, SIZE, 131072)) == bytes(model)
        daemon.stop()
    assert_not_corrupt(base.with_name("disk"))


def lock(fd: int, byte: int, kind: int = fcntl.F_RDLCK, nbytes: int = 1) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, nbytes, 0))


def wait_for_line(daemon: Daemon, word: str) -> str:
    assert daemon.process.stderr is not None
    while word not in (line := daemon.process.stderr.readline()):
        assert line, "it ended"
    return line


@pytest.mark.parametrize("ended", [True, False])
def test_daemon_waits_for_the_transfers_of_a_dead_one(base: Path, ended: bool) -> None:
    """A description that a transfer keeps alive is one that somebody else has open; here, we do."""
    image = overlay(base, "disk")
    fd = os.open(image, os.O_RDWR)
    try:
        for byte in (OURS, 101, 201):
            lock(fd, byte)
        with Daemon(image) as daemon:
            wait_for_line(daemon, "waiting for the last transfers of a process that died")
            if ended:
                os.close(fd)
                with FrontEnd(daemon.socket_path) as guest:
                    guest.write(0, b"x" * 512)
            daemon.stop()
    finally:
        if not ended:
            os.close(fd)


def test_daemon_does_not_wait_for_one_that_lives(base: Path) -> None:
    image = overlay(base, "disk")
    fd = os.open(image, os.O_RDWR)
    try:
        for byte in (OURS, LIVES + os.getpid(), 101, 201):
            lock(fd, byte)
        with Daemon(image) as daemon:
            _, said = daemon.process.communicate(timeout=TIMEOUT)
            assert daemon.process.returncode == 1
            assert "is another process using the image?" in said
    finally:
        os.close(fd)


@pytest.mark.parametrize("lives", [False, True])
def test_reads_of_a_dead_daemon_into_the_guests_memory_are_awaited(base: Path, lives: bool) -> None:
    """Of a read-only disk, which more than one may have. One that lives does no harm."""
    guest = FrontEnd(Path(), connect=False)
    with guest, Daemon(base, "--format=raw", "--read-only", "--cache=none") as daemon:
        numbers = [(status.st_dev, status.st_ino) for status in (os.fstat(guest.memory_fd), os.stat(base))]
        key = guest_key(numbers[0], numbers[1])
        fd = os.open(base, os.O_RDONLY)
        lock(fd, GUESTS + key)
        if lives:
            lock(fd, GUESTS_LIVE + key * PROCESSES + os.getpid())
            guest.connect(daemon.socket_path)
            os.close(fd)
        else:

            def live() -> int:
                wait_for_line(daemon, "waiting for the last reads")
                return 0

            child = fork(live)
            os.close(fd)  # as the last transfer does; the child still has it
            guest.connect(daemon.socket_path)
            assert status_of(child) == 0
        assert guest.read(0, 512) == b"b" * 512
        daemon.stop()


def test_memory_that_may_not_be_read_into_is_closed(base: Path) -> None:
    """A lock fails, by which another daemon would know that this one lives: the visit ends."""
    image, more = overlay(base, "disk"), os.memfd_create("more", os.MFD_CLOEXEC)
    os.truncate(more, 4096)
    numbers = [(status.st_dev, status.st_ino) for status in (os.fstat(more), os.stat(image))]
    with Daemon(image, "--cache=none") as daemon, open(base, "r+b") as beside:
        before = serve_and_count(daemon)
        with FrontEnd(daemon.socket_path) as guest:
            lives = GUESTS_LIVE + guest_key(numbers[0], numbers[1]) * PROCESSES
            lock(beside.fileno(), lives, fcntl.F_WRLCK, nbytes=PROCESSES)
            with pytest.raises(BackendGone):
                guest.tell(ADD_MEM_REG, struct.pack("<QQQQQ", 0, 1 << 40, 4096, 1 << 40, 0), fds=(more,))
            lock(beside.fileno(), lives, fcntl.F_UNLCK, nbytes=PROCESSES)
        assert serve_and_count(daemon) == before
        daemon.stop()
    os.close(more)


def serve_and_count(daemon: Daemon) -> int:
    """How many descriptors it has while it serves."""
    with FrontEnd(daemon.socket_path) as guest:
        assert guest.read(0, 512) == b"b" * 512
        return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))


def test_two_disks_of_one_guest_share_a_base(base: Path) -> None:
    images = [overlay(base, name) for name in ("one", "two")]
    with Daemon(images[0], "--cache=none") as first, Daemon(images[1], "--cache=none") as second:
        with FrontEnd(first.socket_path) as guest, FrontEnd(Path(), connect=False) as other:
            os.dup2(guest.memory_fd, other.memory_fd)  # the same file; its mapping is not used
            other.connect(second.socket_path)
            assert guest.do(IN, 0, nbytes=512).status == 0
        first.stop()
        second.stop()


def test_direct_descriptors_have_the_locks(base: Path) -> None:
    """QEMU does not get the image while one of them is open, whatever became of the first."""
    image = overlay(base, "disk")
    with Daemon(image, "--cache=none") as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(0, b"x" * 512)
        path = os.path.realpath(image)
        fds = [int(fd) for fd in os.listdir(f"/proc/{daemon.process.pid}/fd") if reads(daemon, fd) == path]
        held = [
            {
                line.split()[4]
                for line in Path(f"/proc/{daemon.process.pid}/fdinfo/{fd}").read_text().splitlines()
                if line.startswith("lock:")
            }
            for fd in fds
        ]
        assert len(fds) == 3
        assert sum(bool(locks) for locks in held) == 3
        daemon.stop()
    assert qemu_img("check", image, check=False).returncode in (0, 3)


def reads(daemon: Daemon, fd: str) -> str:
    try:
        return os.readlink(f"/proc/{daemon.process.pid}/fd/{fd}")
    except FileNotFoundError:
        return ""
