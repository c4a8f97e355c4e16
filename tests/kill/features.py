"""Images with a feature that daemons are killed on, and what is judged of them besides the disk."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bitmapreader import bitmaps_of
from tests.features.ours import open_disk
from tests.features.qemu import Files, Qemu
from tests.features.shape import Shape
from tests.kill.images import Start, old_data
from tests.kill.ledger import SECTOR, Ledger
from tests.oracle import assert_same_bytes, qemu_img
from tests.program import qcow2_tool_ok

FEATURES: dict[str, frozenset[str]] = {
    "data-file": frozenset(["data-file"]),
    "data-file-raw": frozenset(["data-file-raw"]),
    "data-file-parts": frozenset(["data-file", "subclusters"]),
    "data-file-encrypted": frozenset(["data-file", "encrypted"]),
    "encrypted": frozenset(["encrypted"]),
    "encrypted-overlay": frozenset(["encrypted"]),
    "snapshots": frozenset(["snapshots"]),
    "bitmaps": frozenset(["bitmaps"]),
}


@dataclass(frozen=True)
class Featured(Start):
    """An image as `Start`, read and checked by QEMU with all that it needs to know."""

    files: Files

    @property
    def paths(self) -> list[Path]:
        return [self.path, *([self.files.data] if self.files.shape.has_data_file else [])]

    @property
    def options(self) -> list[str]:
        return [f"--key-file={self.path.with_name('key')}"]

    def read(self) -> bytes:
        return Qemu().read(self.files)

    def check(self) -> tuple[int, dict[str, Any]]:
        done = qemu_img("check", *self.files.secret(), "--output=json", self.files.named(), check=False)
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)

    def judge(self, ledger: Ledger) -> None:
        """The raw file is the disk, the snapshot what it was, the bitmap exact. Raises: AssertionError."""
        features = self.files.shape.features
        if "data-file-raw" in features:
            assert_same_bytes(self.files.data.read_bytes(), ledger.contents)
        if "snapshots" in features:
            assert_same_bytes(Qemu().read(self.files, "kept"), self.contents)
        if "bitmaps" in features:
            found = bitmaps_of(self.path)
            assert {name: bitmap.is_valid for name, bitmap in found.items()} == {"fine": True, "coarse": True}
            fine = found["fine"].sectors()
            assert ledger.acknowledged <= fine, f"{len(ledger.acknowledged - fine)} sectors are missing"
            assert fine <= ledger.begun, f"{len(fine - ledger.begun)} sectors are reported that nobody touched"
            assert fine <= found["coarse"].sectors()


def make(kind: str, directory: Path, draw: random.Random, nbytes: int) -> Featured:
    """A new image of *kind*, a quarter of it old data."""
    bits = draw.choice((14, 16) if "subclusters" in FEATURES[kind] else (12, 16))
    base = Shape(frozenset(["encrypted"]), 16) if kind == "encrypted-overlay" else None
    shape = Shape(FEATURES[kind], bits, is_lazy=draw.random() < 0.5, base=base, base_nbytes=nbytes if base else 0)
    files = Files(directory / "a", shape)
    for each in [files.base, files] if files.base else [files]:
        qcow2_tool_ok(*each.create(nbytes))
    content = bytearray(nbytes)
    with open_disk(files.base or files, writable=True) as disk:
        for start in range(0, nbytes, 1 << 20):
            content[start : start + (1 << 18)] = old_data(draw, 1 << 18)
            disk.write(start, content[start : start + (1 << 18)])
        if kind == "bitmaps":
            disk.bitmaps.add("fine", SECTOR)
            disk.bitmaps.add("coarse", 1 << 20)
        if kind == "snapshots":
            disk.create_snapshot("kept")
    return Featured(files.path, bytes(content), shape.is_lazy, bits, files)
