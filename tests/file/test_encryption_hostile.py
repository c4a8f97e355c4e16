"""Encrypted images that lie: whatever their headers say, opening them ends, and in a refusal."""

import json
import os
import random
import signal
import socket
import struct
import subprocess
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

import qcow2
from qcow2.driver.file import HostFile, run
from qcow2.error import ImageError, UnsupportedImage
from qcow2.judge.check import check
from tests.file.test_convert import wait_until
from tests.frontend import FrontEnd
from tests.program import DAEMON, TOOL, Daemon, complaints, qcow2_tool, qcow2_tool_ok

MUTANTS = 150
SMALL = "cluster_size=4k,encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=1,encrypt.hash-alg=sha1"


@pytest.mark.parametrize("image_format", ["qcow2", "luks"])
def test_mutants_of_the_headers_open_or_are_refused(tmp_path: Path, image_format: str) -> None:
    path = tmp_path / "disk"
    words = SMALL if image_format == "qcow2" else "key-secret=s0,iter-time=1,hash-alg=sha1"
    secret = ("--object", "secret,id=s0,data=k")
    qcow2_tool_ok("create", "-q", "-f", image_format, *secret, "-o", words, path, "1M")
    original = path.read_bytes()
    luks = original.index(b"LUKS\xba\xbe")
    chance = random.Random(image_format)
    opened = refused = 0
    for _ in range(MUTANTS):
        content = bytearray(original)
        for _ in range(chance.randint(1, 3)):
            # Not the iterations: that a header can ask for minutes is no news, see below.
            slot = luks + chance.randrange(240, 256)
            where = chance.choice((chance.randrange(200), luks + chance.randrange(164), slot))
            content[where] = chance.choice((0, 1, 0x7F, 0xFF, chance.randrange(256)))
        path.write_bytes(content[: chance.choice((len(content), len(content), luks + 300))])
        try:
            with qcow2.open(path, format=image_format, key=b"k", writable=chance.random() < 0.5) as disk:
                disk.read(0, min(disk.size, 4096))
            opened += 1
        except (ImageError, OSError):
            refused += 1
        if image_format == "qcow2":
            with HostFile.open(str(path)) as file, suppress(ImageError):
                run(check(file))
    assert opened > MUTANTS // 20
    assert refused > MUTANTS // 4


# -- a header that asks for minutes: a signal ends who waits for them, and all slots together ask for so much only

SLOTS = 208  # of the header: 48 bytes each, which begin with the state and the iterations
ON = 0x00AC71F3
LONG = 1 << 27


def slow(path: Path, *iterations: int) -> Path:
    """An encrypted image whose key slots ask for *iterations*, one each but for those that are 0: as they are."""
    qcow2.create(path, 1 << 20, key=b"k", iter_time=1)
    content = bytearray(path.read_bytes())
    luks = content.index(b"LUKS\xba\xbe")
    for number, count in enumerate(iterations):
        if count:
            struct.pack_into(">II", content, luks + SLOTS + 48 * number, ON, count)
    path.write_bytes(content)
    return path


def seconds_of(pid: int) -> float:
    """How long that process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("program", ["convert", "serve-nbd", "daemon"])
def test_a_signal_ends_who_derives_a_key(tmp_path: Path, program: str, number: signal.Signals) -> None:
    path, key, place = slow(tmp_path / "disk", LONG), tmp_path / "key", tmp_path / "socket"
    key.write_bytes(b"k")
    secret = ["--object", f"secret,id=s0,file={key}"]
    command: list[str | Path] = {
        "convert": [TOOL, "convert", *secret, "-O", "raw", path, tmp_path / "plain"],
        "serve-nbd": [TOOL, "serve-nbd", *secret, "-k", place, path],
        "daemon": [DAEMON, f"--key-file={key}", f"--socket-path={place}", f"--blk-file={path}"],
    }[program]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: seconds_of(process.pid) > 2)
            process.send_signal(number)
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()
    assert (process.returncode, complaints(said)) == (-number if program == "convert" else 0, "")


@pytest.mark.parametrize(
    ("waits_for", "request_"),
    [
        ("disk", {"command": "resize", "size": 2 << 20}),
        ("copy", {"command": "mirror", "target": "copy", "existing": True}),
    ],
)
def test_a_signal_ends_a_command_that_derives_a_key(tmp_path: Path, waits_for: str, request_: dict[str, Any]) -> None:
    image, key = tmp_path / "disk", tmp_path / "key"
    key.write_bytes(b"k")
    qcow2.create(image, 1 << 20, key=b"k", iter_time=1)
    with ExitStack() as stack:
        daemon = stack.enter_context(Daemon(image, f"--control={image}.control", f"--key-file={key}"))
        guest = stack.enter_context(FrontEnd(daemon.socket_path))
        if waits_for == "disk":
            guest.stop_queue()  # the image is let go: it may be another one when it is opened again
        slow(tmp_path / waits_for, LONG)
        client = stack.enter_context(socket.socket(socket.AF_UNIX))
        client.connect(f"{image}.control")
        before = seconds_of(daemon.process.pid)
        client.sendall(json.dumps(request_).encode() + b"\n")
        wait_until(lambda: seconds_of(daemon.process.pid) > before + 2)
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(20) == 0


def test_all_key_slots_together_ask_for_less_than_forever(tmp_path: Path) -> None:
    path = slow(tmp_path / "disk", *[LONG // 2] * 8)
    with pytest.raises(UnsupportedImage, match="its key slots ask for 536878912 iterations, limit 268435456"):
        qcow2.open(path, key=b"k")


def test_no_key_slot_is_added_with_which_nobody_opens_the_image(tmp_path: Path) -> None:
    path = slow(tmp_path / "disk", 0, LONG, LONG - 6000)  # and 1,000 of the first, as often for the digest of each
    before = path.read_bytes()
    secrets = ["--object", "secret,id=a,data=k", "--object", "secret,id=b,data=b"]
    wanted = "encrypt.state=active,encrypt.new-secret=b,encrypt.iter-time=1"
    done = qcow2_tool("amend", *secrets, "-o", wanted, path)
    assert done.returncode == 1
    assert "limit 268435456" in done.stderr
    assert done.stderr.count("\n") == 1
    assert path.read_bytes() == before
    qcow2.open(path, key=b"k").close()
