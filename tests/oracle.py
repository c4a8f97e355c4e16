"""The independent judge: QEMU's tools on an image file, a header parser of its own, and a model disk in a bytearray."""

import hashlib
import json
import os
import struct
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.builder.record import HEADER_FIELDS, V2_FIELDS
from tests.patience import TIMEOUT


def ask_qemu(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """Run a program of QEMU's; again where it could not measure its own processor time, as it does for a new key.

    The kernel counts a thread's time in ticks: on a busy machine none may fall into what 7.2 measures.
    """
    for _ in range(50):
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT)
        if "accurate CPU usage" not in done.stderr:
            break
    return done


def qemu_img(*arguments: str | Path, check: bool = True, program: str = "qemu-img") -> subprocess.CompletedProcess[str]:
    """Run qemu-img, or that of one of `peers`; a failure raises with what it said unless *check* is false."""
    command = [program, *map(str, arguments)]
    done = ask_qemu(command)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def peers() -> list[str]:
    """Each qemu-img that is here: this host's, and that of QEMU_BIN."""
    other = os.environ.get("QEMU_BIN")
    return ["qemu-img", *([f"{other}/qemu-img"] if other else [])]


def qemu_io(path: Path, *commands: str, options: tuple[str, ...] = ()) -> str:
    """Run qemu-io *commands* one after the other on a qcow2 image."""
    arguments = [argument for command in commands for argument in ("-c", command)]
    command = ["qemu-io", "-f", "qcow2", *options, *arguments, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    if done.returncode or "error" in done.stdout.lower() or "failed" in done.stdout.lower():
        raise AssertionError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


@contextmanager
def held_by_qemu(path: Path, *, read_only: bool = False) -> Iterator[None]:
    """qemu-io has the image open until the end of the block."""
    command = ["qemu-io", "-f", "qcow2", *(["-r"] if read_only else []), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("length\n")
        process.stdin.flush()
        process.stdout.readline()  # it answers, so it has opened the image
        yield
        process.stdin.close()
        process.stdout.read()


def qemu_check(path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit code (0 clean, 1 could not check, 2 corruptions, 3 leaks) and report of `qemu-img check`."""
    done = qemu_img("check", "-f", "qcow2", "--output=json", *options, path, check=False)
    if done.returncode not in (0, 1, 2, 3) or not done.stdout:
        raise AssertionError(f"qemu-img check {path}: exit {done.returncode}: {done.stderr}")
    return done.returncode, json.loads(done.stdout)


def assert_clean(path: Path) -> None:
    """No corruption and no leak, says qemu-img."""
    done = qemu_img("check", "-f", "qcow2", path, check=False)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def assert_not_corrupt(path: Path) -> None:
    """Leaks are permitted, corruption is not."""
    done = qemu_img("check", "-f", "qcow2", path, check=False)
    assert done.returncode in (0, 3), f"exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def qemu_read(path: Path, image_format: str = "qcow2", snapshot: str | None = None) -> bytes:
    """The whole disk (or one internal snapshot of it) as QEMU reads it."""
    raw = path.with_name(path.name + ".read-by-qemu")
    chosen = ["-l", f"snapshot.name={snapshot}"] if snapshot else []
    qemu_img("convert", "-f", image_format, *chosen, "-O", "raw", path, raw)
    try:
        return raw.read_bytes()
    finally:
        raw.unlink()


def assert_same_disk(path: Path, expected: bytes) -> None:
    """QEMU reads exactly *expected*; a difference is named by its first byte."""
    assert_same_bytes(qemu_read(path), expected)


def assert_same_bytes(actual: bytes | bytearray, expected: bytes | bytearray) -> None:
    """Equal, or fail naming the first difference instead of printing both."""
    assert len(actual) == len(expected)
    if actual != expected:
        at = next(i for i in range(0, len(actual), 512) if actual[i : i + 512] != expected[i : i + 512])
        wrong = sum(actual[i : i + 512] != expected[i : i + 512] for i in range(0, len(actual), 512))
        is_now, should = actual[at : at + 16].hex(), expected[at : at + 16].hex()
        raise AssertionError(f"{wrong} sectors differ, first at {at:#x}: {is_now} is not {should}")


def backing_name(path: Path) -> str | None:
    """What the header calls the backing file, also while somebody writes to the image."""
    name: str | None = json.loads(qemu_img("info", "-U", "--output=json", path).stdout).get("backing-filename")
    return name


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Header:
    """What the first cluster says: the fields by name, the extensions in file order, the backing name."""

    fields: dict[str, int]
    extensions: list[tuple[int, bytes]]
    backing: str

    @property
    def is_dirty(self) -> bool:
        return bool(self.fields.get("incompatible_features", 0) & 1)


def read_header(path: Path) -> Header:
    with path.open("rb") as file:
        first = file.read(1 << 21)
    version = struct.unpack_from(">I", first, 4)[0]
    names = V2_FIELDS if version == 2 else tuple(HEADER_FIELDS)
    fields = {
        name: struct.unpack_from(">" + HEADER_FIELDS[name][1], first, HEADER_FIELDS[name][0])[0] for name in names
    }
    at = 72 if version == 2 else fields["header_length"]
    extensions = []
    while True:
        kind, length = struct.unpack_from(">II", first, at)
        if kind == 0:
            break
        extensions.append((kind, first[at + 8 : at + 8 + length]))
        at += 8 + (length + 7) // 8 * 8
    start = fields["backing_file_offset"]
    return Header(fields, extensions, first[start : start + fields["backing_file_size"]].decode() if start else "")
