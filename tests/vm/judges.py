"""Who says whether the files of a disk are sound, and its backups tell what has changed."""

import os
import subprocess
from pathlib import Path

import qcow2
from qcow2.node.extent import Extent

JUDGES = ["/usr/bin/qemu-img", *([f"{directory}/qemu-img"] if (directory := os.environ.get("JUDGE_BIN")) else [])]
LEAKS = 3  # exit code of qemu-img check
CHUNK = 64 << 10  # of a backup


def assert_sound(path: Path, *options: str) -> None:
    """Each judge finds no worse than leaks in the image at *path*."""
    for program in JUDGES:
        command = [program, "check", "-q", "-f", "qcow2", *options, path]
        judged = subprocess.run(command, capture_output=True, text=True, check=False)
        assert judged.returncode in (0, LEAKS), f"{path}: {judged.stdout}{judged.stderr}"


def assert_reported(before: Path, whole: Path, after: Path) -> None:
    """What differs between two backups a bitmap has reported by the next one, which is over the first."""
    with qcow2.open(before) as one, qcow2.open(whole) as other, qcow2.open(after) as top:
        own = [extent for extent in top.extents(0, top.size) if extent.depth == 0 and extent.is_present]
        reported = {chunk for extent in own for chunk in _chunks_of(extent)}
        for chunk in range(min(one.size, other.size) // CHUNK):
            if chunk not in reported:
                pair = one.read(chunk * CHUNK, CHUNK), other.read(chunk * CHUNK, CHUNK)
                assert pair[0] == pair[1], f"{whole} differs from {before} at {chunk * CHUNK:#x}, not reported"


def _chunks_of(extent: Extent) -> range:
    return range(extent.guest_offset // CHUNK, -(-(extent.guest_offset + extent.nbytes) // CHUNK))
