"""`qcow2 bench` moves what it says, and `convert --salvage` what can be read."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.oracle import assert_clean, held_by_qemu, qemu_img, qemu_io, qemu_read
from tests.program import TIMEOUT, TOOL, qcow2_tool, qcow2_tool_ok

MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "a", "1M")
    return tmp_path / "a"


def test_writes_reach_the_disk(path: Path) -> None:
    words = [
        "-w",
        "-c",
        "30",
        "-d",
        "4",
        "-s",
        "16k",
        "-S",
        "32k",
        "-o",
        "64k",
        "--pattern=0x55",
        "--flush-interval=10",
    ]
    first, second, last = qcow2_tool_ok("bench", *words, path).splitlines()
    said = "Sending 30 write requests, 16384 bytes each, 4 in parallel (starting at offset 65536, step size 32768)"
    assert (first, second) == (said, "Sending flush every 10 requests")
    assert re.fullmatch(r"Run completed in \d+\.\d{3} seconds\.", last)
    assert_clean(path)
    expected = b"".join(
        bytes([0x55 if at >= 65536 and at // 16384 % 2 == 0 else 0]) * 16384 for at in range(0, MIB, 16384)
    )
    assert qemu_read(path) == expected


def test_reads_change_nothing(path: Path) -> None:
    before = path.read_bytes()
    assert qcow2_tool_ok("bench", "-q", "-c", "500", path) == ""
    assert path.read_bytes() == before


def test_an_image_in_use_is_measured_with_force_share(path: Path) -> None:
    with held_by_qemu(path):
        assert "lock" in qcow2_tool("bench", "-c", "5", path).stderr
        assert "Run completed" in qcow2_tool_ok("bench", "-U", "-c", "5", path)


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
@pytest.mark.parametrize("verb", [["-w", "--pattern=7"], []], ids=["write", "read"])
@pytest.mark.parametrize(
    "place",
    [["-o", "1M"], ["-o", "4M"], ["-o", "8G"], ["-o", "1022k"], ["-c", "3", "-o", "1040k"], ["-s", "2M"]],
    ids=["end", "past", "far", "across", "wrapping", "long"],
)
def test_what_begins_outside_the_disk_fails_and_changes_nothing(
    path: Path, place: list[str], verb: list[str], image_format: str
) -> None:
    if image_format == "raw":
        path.write_bytes(b"\1" * MIB)
    else:
        qemu_io(path, "write -P 1 0 1M")
    before = path.read_bytes()
    done = qcow2_tool("bench", "-c", "1", "-d", "1", *verb, *place, "-f", image_format, path)
    assert (done.returncode, done.stderr) == (1, "qcow2: Failed request: Input/output error\n")
    assert "completed" not in done.stdout
    assert path.read_bytes() == before


def test_no_requests_are_refused(path: Path) -> None:
    done = qcow2_tool("bench", "-c", "0", path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Invalid request count specified" in done.stderr


@pytest.fixture
def broken(path: Path) -> Path:
    """A disk of which one cluster cannot be read."""
    qemu_io(path, "write -c -P 6 512k 64k", "write -P 7 0 64k")
    content = bytearray(path.read_bytes())
    (entry,) = [int.from_bytes(content[at : at + 8], "big") for at in range(0x40000 + 64, 0x40000 + 72, 8)]
    place = entry & ((1 << 54) - 1)
    content[place : place + 40] = b"\xff" * 40
    path.write_bytes(content)
    return path


SALVAGED = (b"\7" * 65536).ljust(MIB, b"\0")


def test_what_cannot_be_read_is_zeros_and_said(broken: Path) -> None:
    new = broken.with_name("new")
    assert qcow2_tool("convert", "-O", "raw", broken, new).returncode == 1
    done = qcow2_tool("convert", "--salvage", "-O", "raw", broken, new)
    assert done.returncode == 0
    assert len(done.stderr.splitlines()) == 128
    assert "warning: error while reading offset 524288: " in done.stderr
    assert new.read_bytes() == SALVAGED


def test_what_cannot_be_read_is_not_said_with_quiet(broken: Path) -> None:
    done = qcow2_tool("convert", "--salvage", "-q", "-O", "raw", broken, broken.with_name("new"))
    assert (done.returncode, done.stderr) == (0, "")
    assert broken.with_name("new").read_bytes() == SALVAGED


@pytest.mark.parametrize("errors", ["full", "unread"])
def test_words_that_nobody_hears_end_no_rescue(broken: Path, errors: str) -> None:
    new, words = broken.with_name("new"), ["convert", "--salvage", "-O", "raw"]
    if errors == "full":
        fd = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, fd = os.pipe()
        os.close(reader)
    done = subprocess.run([TOOL, *words, broken, new], stderr=fd, timeout=TIMEOUT, check=False)
    os.close(fd)
    assert (done.returncode, new.read_bytes()) == (0, SALVAGED)


def test_asking_how_far_it_is_ends_nothing_where_nobody_hears(path: Path) -> None:
    qemu_io(path, "write -P 7 0 1M")
    new, words = path.with_name("new"), ["convert", "-p", "-r", "1M", "-O", "raw"]
    with open("/dev/full", "w") as full:
        program = subprocess.Popen([TOOL, *words, path, new], stdout=subprocess.PIPE, stderr=full)
        assert program.stdout is not None
        program.stdout.read(1)  # it shows how far it is, and so hears the signal
        program.send_signal(signal.SIGUSR1)
        said, _ = program.communicate(timeout=TIMEOUT)
    assert (program.returncode, b"100.00" in said, new.read_bytes()) == (0, True, b"\7" * MIB)
