"""Each door on storage that hangs, and a signal in the middle: nothing acknowledged is lost, and no image is broken."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import qcow2
from tests import slowdisk
from tests.border.library import ACKNOWLEDGED, FLUSHED
from tests.frontend import FLUSH, FrontEnd
from tests.oracle import assert_clean, assert_not_corrupt, read_header
from tests.program import DAEMON, TIMEOUT, TOOL, Daemon, qcow2_tool_ok, run
from tests.slowdisk import SlowDisk

SIZE = 8 << 20
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
COMMANDS = {
    "check": ("check", "-r", "all"),
    "resize": ("resize", "IMAGE", "16M"),
    "snapshot": ("snapshot", "-c", "one"),
    "rebase": ("rebase", "-u", "-b", "", "IMAGE"),
}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SlowDisk]:
    for name in ("backing", "slow"):
        (tmp_path / name).mkdir()
    with SlowDisk(tmp_path / "backing", tmp_path / "slow") as disk:
        yield disk


def new_image(disk: SlowDisk, number: int) -> Path:
    """One with flushed data; what is returned is its name beside the slow disk, where sockets can be."""
    path = disk.path / f"image{number}"
    qcow2_tool_ok("create", "-o", "lazy_refcounts=on", path, str(SIZE))
    with qcow2.open(path, writable=True) as opened:
        opened.write(FLUSHED, b"F" * 4096)
    beside = disk.path.with_name(path.name)
    beside.symlink_to(path)
    return beside


def leave_dirty(image: Path) -> None:
    disk = qcow2.open(image, writable=True)
    disk.write(2 * FLUSHED, b"x" * 4096)
    disk.flush()
    disk.abandon()


def assert_kept(image: Path) -> None:
    """The flushed data is there, once what a death left is repaired."""
    with qcow2.open(image, writable=True) as disk:
        assert disk.read(FLUSHED, 4096) == b"F" * 4096
    assert_not_corrupt(image)


def interrupt(disk: SlowDisk, words: Sequence[str | Path], number: signal.Signals) -> "subprocess.Popen[str]":
    """Run *words*, and give it *number* while its first sync hangs."""
    with subprocess.Popen([*map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        with disk.holding(slowdisk.FSYNC):
            disk.wait_for_one()
            process.send_signal(number)
            disk.let_others_pass()
        _, said = process.communicate(timeout=TIMEOUT)
    assert "Traceback" not in said or number is signal.SIGINT, said
    return process


@pytest.mark.parametrize("command", COMMANDS)
def test_tool(disk: SlowDisk, command: str) -> None:
    """Whatever ends it in the middle of a change, the image holds what it held."""
    for number in SIGNALS:
        image = new_image(disk, number)
        if command == "check":
            leave_dirty(image)
        words = [image if word == "IMAGE" else word for word in COMMANDS[command]]
        process = interrupt(disk, [TOOL, *words, *([] if image in words else [image])], number)
        assert process.returncode in (0, -number)
        assert_kept(image)


def call_off(disk: SlowDisk, number: signal.Signals, *words: str | Path) -> None:
    """Run the tool, and give it *number* while its first write hangs: it dies of that without a word."""
    with subprocess.Popen([TOOL, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        with disk.holding(slowdisk.WRITE):
            disk.wait_for_one()
            process.send_signal(number)
            wait_until_heard(process.pid)
            disk.let_others_pass()
        _, said = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, said) == (-number, "")


def wait_until_heard(pid: int) -> None:
    """Return once the first thread of the process has no signal before it and sleeps again."""
    ends_at = time.monotonic() + TIMEOUT
    while time.monotonic() < ends_at:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        if status["State"][0] == "S" and not int(status["SigPnd"], 16) | int(status["ShdPnd"], 16):
            return
    raise TimeoutError(f"process {pid} hears no signal")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_another_refcount_width_is_called_off_between_two_steps(disk: SlowDisk, number: signal.Signals) -> None:
    image = new_image(disk, number)
    call_off(disk, number, "amend", "-o", "refcount_bits=64", image)
    assert read_header(image).fields["refcount_order"] == 4
    assert_clean(image)
    assert_kept(image)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_preallocation_is_called_off_between_two_steps(disk: SlowDisk, number: signal.Signals) -> None:
    image = disk.path / "image"
    image.touch()
    call_off(disk, number, "resize", "-f", "raw", "--preallocation=full", image, "512M")
    assert image.stat().st_size == 512 << 20
    assert image.stat().st_blocks * 512 < 256 << 20, "it went on to its end"


def test_library(disk: SlowDisk) -> None:
    """A program of its user's that ends in the middle of a flush."""
    for number in SIGNALS:
        image = new_image(disk, number)
        process = interrupt(disk, [sys.executable, "-m", "tests.border.library", image, "write"], number)
        assert process.returncode in (-number, 1)
        assert_kept(image)


def test_daemon(disk: SlowDisk) -> None:
    """It ends once the disk answers, with what was flushed and what was acknowledged."""
    for number in SIGNALS[1:]:
        image = new_image(disk, number)
        with Daemon(image) as daemon, FrontEnd(daemon.socket_path) as front_end:
            front_end.write(ACKNOWLEDGED, b"A" * 4096)
            with disk.holding(slowdisk.FSYNC):
                front_end.submit(FLUSH)
                disk.wait_for_one()
                daemon.process.send_signal(number)
                disk.let_others_pass()
            assert daemon.process.wait(TIMEOUT) in (0, -number)
        with qcow2.open(image, writable=True) as opened:
            assert opened.read(ACKNOWLEDGED, 4096) == b"A" * 4096
        assert_kept(image)


def test_a_daemon_says_how_it_is_and_ends_a_job_while_a_command_hangs(disk: SlowDisk, tmp_path: Path) -> None:
    image = new_image(disk, 0)
    control = f"--control={image}.control"
    with Daemon(image, control) as daemon, FrontEnd(daemon.socket_path) as front_end:
        front_end.write(ACKNOWLEDGED, b"A" * 4096)
        assert run(DAEMON, "ctl", control, "backup", "--rate=1", str(tmp_path / "copy")).returncode == 0
        with disk.holding(slowdisk.FSYNC):
            hanging = subprocess.Popen([DAEMON, "ctl", control, "flush"])
            disk.wait_for_one()
            for words in (["status"], ["stats"], ["job", "list"], ["export", "list"], ["job", "cancel", "1"]):
                assert run(DAEMON, "ctl", control, *words).returncode == 0
            assert run(DAEMON, "ctl", control, "job", "wait", "1").stderr.endswith("job 1 cancelled\n")
            assert hanging.poll() is None
        assert hanging.wait(TIMEOUT) == 0
        daemon.stop()


def test_library_waits_for_a_slow_disk_and_no_longer(disk: SlowDisk) -> None:
    script = [sys.executable, "-m", "tests.border.library", str(new_image(disk, 0))]
    with disk.holding(slowdisk.FSYNC, slowdisk.WRITE):
        process = subprocess.Popen([*script, "write"])
        disk.wait_for_one()
        assert process.poll() is None
    assert process.wait(TIMEOUT) == 0
    assert subprocess.check_output([*script, "read"], text=True) == "F A\n"
