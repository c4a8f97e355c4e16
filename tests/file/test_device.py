"""A block device written in Python under the daemon: the RAM disk of the examples, and awkward ones."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.frontend import FLUSH, GET_ID, IN, IOERR, OK, UNSUPP
from tests.listening import visit
from tests.program import TIMEOUT, complaints

RAMDISK = Path(__file__).resolve().parents[2] / "examples" / "ramdisk.py"

# Says on stdout what it was asked for; its sectors have opinions.
NOISY = """
import errno, sys
import vhost
from virtio.block import BlockDevice, RequestError

class Noisy(BlockDevice):
    size = 1 << 20
    serial = "noisy"

    def read(self, offset, nbytes):
        if offset == 512:
            raise OSError(errno.EIO, "cannot read")
        if offset == 1024:
            raise RequestError(2)
        if offset == 2048:
            return b"too short"
        return bytes([7]) * nbytes

    def write(self, offset, data):
        print("write", offset, len(data), set(data), flush=True)

    def flush(self):
        print("flush", flush=True)

vhost.serve(Noisy(), socket_path=sys.argv[1])
"""


@contextmanager
def serving(path: Path, *command: str | Path) -> Iterator["subprocess.Popen[str]"]:
    """Run *command*, which serves on *path*."""
    process = subprocess.Popen(
        [sys.executable, *command, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=TIMEOUT)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "device.sock"


@pytest.fixture
def noisy(path: Path) -> Iterator["subprocess.Popen[str]"]:
    with serving(path, "-c", NOISY) as process:
        yield process


def said(process: "subprocess.Popen[str]") -> list[str]:
    """End it well and return what it printed."""
    process.terminate()
    out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, complaints(err)) == (0, "")
    return out.splitlines()


def test_ram_disk_keeps_what_is_written(path: Path) -> None:
    with serving(path, RAMDISK) as process:
        with visit(process, path) as guest:
            guest.write(4096, b"hello".ljust(512, b"\0"))
        with visit(process, path) as guest:
            assert guest.read(4096, 512).rstrip(b"\0") == b"hello"
        assert said(process) == []


def test_ram_disk_zeroes_and_discards(path: Path) -> None:
    with serving(path, RAMDISK) as process, visit(process, path) as guest:
        guest.write(0, b"\1" * 4096)
        guest.write_zeroes(512, 1024, unmap=True)
        assert guest.read(0, 4096) == b"\1" * 512 + bytes(1024) + b"\1" * 2560


@pytest.mark.parametrize(("guest_offset", "status"), [(0, OK), (512, IOERR), (1024, UNSUPP)])
def test_exceptions_become_statuses(noisy: "subprocess.Popen[str]", path: Path, guest_offset: int, status: int) -> None:
    with visit(noisy, path) as guest:
        assert guest.do(IN, guest_offset, nbytes=512).status == status


def test_device_that_returns_too_little_ends_the_process_loudly(noisy: "subprocess.Popen[str]", path: Path) -> None:
    with visit(noisy, path) as guest:
        guest.submit(IN, 2048, nbytes=512)
        _, err = noisy.communicate(timeout=TIMEOUT)
    assert noisy.returncode != 0
    assert "9 bytes stored into a buffer of 512" in err


def test_serial_is_the_device_s(noisy: "subprocess.Popen[str]", path: Path) -> None:
    with visit(noisy, path) as guest:
        assert guest.do(GET_ID, nbytes=20).data == b"noisy".ljust(20, b"\0")


def test_flush_reaches_the_device(noisy: "subprocess.Popen[str]", path: Path) -> None:
    with visit(noisy, path) as guest:
        guest.write(0, b"\3" * 512)
        assert guest.do(FLUSH).status == OK
    assert said(noisy) == ["write 0 512 {3}", "flush"]


def test_driver_without_flush_gets_one_after_every_write(noisy: "subprocess.Popen[str]", path: Path) -> None:
    with visit(noisy, path, features=0) as guest:
        guest.write(0, b"\3" * 512)
        guest.write(512, b"\4" * 512)
    assert said(noisy) == ["write 0 512 {3}", "flush", "write 512 512 {4}", "flush"]


def test_discard_is_a_hint_that_may_be_ignored(noisy: "subprocess.Popen[str]", path: Path) -> None:
    with visit(noisy, path) as guest:
        guest.discard(0, 512)
    assert said(noisy) == []


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ("size = 1000", "size 1000 is not a multiple"),
        ("size = -512", "size -512"),
        ("size = 4096; block_size = 1000", "block size 1000 is not a power of two"),
        ("size = 8192; block_size = 8192", "block size 8192"),
        ("size = 512; serial = 'x' * 21", "more than 20 bytes"),
    ],
)
def test_impossible_device_is_refused(path: Path, attributes: str, words: str) -> None:
    program = f"""
import sys, vhost
from virtio.block import BlockDevice
class Bad(BlockDevice):
    {attributes}
vhost.serve(Bad(), socket_path=sys.argv[1])
"""
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode != 0
    assert words in done.stderr.splitlines()[-1]
