"""A killed daemon's transfers that storage holds up: the next one waits for their end, for as long as it takes.

O_DIRECT transfers of io_uring outlive the process. Any other has a thread that waits for it, so that the process
outlives the signal; with io_uring that is one of the kernel's own.
"""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import slowdisk
from tests.blockguest import MIB
from tests.frontend import IN, OUT, FrontEnd
from tests.program import TIMEOUT, Daemon
from tests.slowdisk import SlowDisk

SIZE = 16 * MIB
FAR = 12 * MIB  # not read ahead of


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SlowDisk]:
    backing, mount_point = tmp_path / "backing", tmp_path / "slow"
    backing.mkdir()
    mount_point.mkdir()
    (backing / "disk").write_bytes(b"o" * SIZE)
    (tmp_path / "image").symlink_to(mount_point / "disk")  # the sockets lie beside it
    with SlowDisk(backing, mount_point) as disk:
        yield disk


def wait_for_line(daemon: Daemon, word: str) -> None:
    assert daemon.process.stderr is not None
    while word not in (line := daemon.process.stderr.readline()):
        assert line, "it ended"


@pytest.mark.parametrize("cache", ["none", "writeback"])
@pytest.mark.parametrize("aio", ["auto", "threads"])
def test_next_daemon_waits_for_a_dead_ones_write(disk: SlowDisk, tmp_path: Path, aio: str, cache: str) -> None:
    image, options = tmp_path / "image", ("--format=raw", f"--aio={aio}", f"--cache={cache}")
    with Daemon(image, *options) as dead, FrontEnd(dead.socket_path) as guest:
        with disk.holding(slowdisk.WRITE):
            guest.submit(OUT, FAR, b"d" * 4096)
            disk.wait_for_one()
            dead.process.kill()
            with Daemon(image, *options) as daemon:
                wait_for_line(daemon, "waiting for the last transfers of a process that died")
                disk.let_go()
                with FrontEnd(daemon.socket_path) as other:
                    assert other.read(FAR, 4096) == b"d" * 4096
                    other.write(FAR, b"n" * 4096)
                    other.flush()
                daemon.stop()
        dead.process.wait(TIMEOUT)
    with (tmp_path / "backing" / "disk").open("rb") as file:
        assert os.pread(file.fileno(), 4096, FAR) == b"n" * 4096


@pytest.mark.parametrize("aio", ["auto", "threads"])
def test_next_daemon_of_a_read_only_disk_waits_for_a_dead_ones_read(disk: SlowDisk, tmp_path: Path, aio: str) -> None:
    """It would land in the guest's memory, which is in use again."""
    image, options = tmp_path / "image", ("--format=raw", "--read-only", f"--aio={aio}", "--cache=none")
    with Daemon(image, *options) as dead, FrontEnd(dead.socket_path) as guest:
        with disk.holding(slowdisk.READ):
            guest.submit(IN, FAR, nbytes=4096)
            disk.wait_for_one()
            dead.process.kill()
            disk.let_others_pass()  # the next daemon looks at the disk when it begins
            with Daemon(image, *options) as daemon, FrontEnd(Path(), connect=False) as next_guest:
                os.dup2(guest.memory_fd, next_guest.memory_fd)  # the same memory, be its old connection open or not
                connecting = threading.Thread(target=next_guest.connect, args=(daemon.socket_path,))
                connecting.start()
                wait_for_line(daemon, "waiting for the last reads of a process that died")
                assert connecting.is_alive()
                disk.let_go()
                connecting.join()
                daemon.stop()
        dead.process.wait(TIMEOUT)
