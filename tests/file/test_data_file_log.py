"""Writes to a data file over a base, whose links wait in the log: whoever opens the image next finds them."""

import subprocess
from pathlib import Path

import pytest

import qcow2
from tests.file.test_data_file import assert_sound
from tests.frontend import FrontEnd
from tests.program import Daemon, qcow2_tool, qcow2_tool_ok

SIZE = 4 << 20
MODEL = bytes([2]) * 4096 + bytes([1]) * (SIZE - 8192) + bytes([3]) * 4096


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """What a daemon left that was killed while links waited."""
    path = tmp_path / "disk.qcow2"
    (tmp_path / "base.raw").write_bytes(bytes([1]) * SIZE)
    qcow2_tool_ok("create", "-o", "data_file=disk.raw", "-b", "base.raw", "-F", "raw", path)
    with Daemon(path) as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(0, bytes([2]) * 4096)
        guest.write(SIZE - 4096, bytes([3]) * 4096)
        daemon.kill()
    assert qcow2_tool("map", path).stdout.count("disk.raw") == 0, "they wait"
    return path


def assert_found(image: Path) -> None:
    qcow2_tool_ok("check", "-q", "-r", "leaks", image)  # what a death leaves in reserve
    assert_sound(image, MODEL, is_raw=False)


def test_the_next_daemon_finds_them(image: Path) -> None:
    with Daemon(image, "--sandbox") as daemon, FrontEnd(daemon.socket_path) as guest:
        assert guest.read(0, 8192) == MODEL[:8192]
        assert guest.read(SIZE - 8192, 8192) == MODEL[-8192:]
        daemon.kill()
    assert_found(image)


@pytest.mark.parametrize(
    "command", [("check", "-r", "all"), ("rebase", "-u", "-b", "base.raw", "-F", "raw"), ("resize", "{}", "+0")]
)
def test_the_tool_finds_them(image: Path, command: tuple[str, ...]) -> None:
    words = [str(image) if word == "{}" else word for word in command]
    qcow2_tool_ok(*words, *[image] * ("{}" not in command))
    assert_found(image)


def test_a_data_file_that_another_has_locked_is_an_error(image: Path) -> None:
    raw = image.with_name("disk.raw")
    before = image.read_bytes()
    with subprocess.Popen(
        ["qemu-io", "-f", "raw", raw], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdin.write("read 0 512\n")
        other.stdin.flush()
        assert other.stdout.readline()
        done = qcow2_tool("check", "-r", "all", image)
        assert (done.returncode, "disk.raw" in done.stderr) == (1, True)
        assert image.read_bytes() == before
        other.stdin.close()
    qcow2_tool_ok("check", "-r", "all", image)
    assert_found(image)


def test_an_image_that_does_not_name_its_data_file_keeps_them_until_it_is_said(image: Path) -> None:
    content = bytearray(image.read_bytes())
    at = content.index(b"disk.raw")
    length = content.rindex((8).to_bytes(4, "big"), 0, at)
    assert length == at - 4
    content[at - 8 : at] = (0x12345678).to_bytes(4, "big") + content[length:at]  # an extension that nobody knows
    image.write_bytes(content)
    done = qcow2_tool("check", "-r", "all", image)
    assert (done.returncode, "its external data file is not open" in done.stderr) == (1, True)
    with qcow2.open(image, writable=True, data_file=str(image.with_name("disk.raw"))) as disk:
        assert disk.read(0, SIZE) == MODEL
