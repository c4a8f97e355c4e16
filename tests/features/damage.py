"""`python -m tests.features.damage` breaks a word of an image's metadata, and sets our check and repair beside QEMU's.

Worse is: a fault that each QEMU finds and we do not, a check that does not end well, and a repair after which fewer
clusters of the disk read as before than after the best of QEMU's.
"""

import argparse
import os
import shutil
import struct
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from random import Random
from tempfile import mkdtemp

import qcow2
from qcow2.tool.command import main as main_of_tool
from tests.features.life import Life
from tests.features.ours import open_disk
from tests.features.qemu import Files, Qemu
from tests.features.shape import draw_shape
from tests.oracle import Header, read_header
from tests.patience import TIMEOUT
from tests.program import TOOL

FEATURES = ("subclusters", "data-file", "data-file-raw", "encrypted", "snapshots", "bitmaps", "compressed")
OFFSET = (1 << 56) - 512
CLUSTERS_READ = 4096  # the smallest piece that is compared


@dataclass(frozen=True)
class Word:
    """A word of the metadata: what it belongs to, and where it is."""

    what: str
    offset: int
    nbytes: int = 8


def words_of(image: bytes, header: Header) -> Iterator[Word]:
    """Those that say something, and a few that do not."""
    fields, size = header.fields, 1 << header.fields["cluster_bits"]
    yield from (Word("header", at) for at in (40, 48, 64, 72, 80, 88))
    yield from (Word("header", at, 4) for at in (36, 56, 60, 96))
    l1 = [fields["l1_table_offset"] + 8 * index for index in range(fields["l1_size"])]
    yield from (Word("L1 table", at) for at in l1)
    wide = 16 if fields.get("incompatible_features", 0) & 16 else 8
    for at in l1:
        if table := word(image, at) & OFFSET:
            used = [entry for entry in range(table, table + size, wide) if any(image[entry : entry + wide])]
            yield from (Word("L2 entry", entry) for entry in used)
            if wide == 16:
                yield from (Word("subclusters", entry + 8) for entry in used)
    table = fields["refcount_table_offset"]
    for at in range(table, table + 64, 8):
        yield Word("refcount table", at)
        if block := word(image, at) & OFFSET:
            yield from (Word("refcounts", entry) for entry in range(block, block + min(size, 256), 8))
    if fields["nb_snapshots"]:
        start = fields["snapshots_offset"]
        yield from (Word("snapshot table", at) for at in range(start, start + 64, 8))
        first = word(image, start)
        yield from (Word("snapshot L1", first + 8 * index) for index in range(2))
    for kind, data in header.extensions:
        where = image.index(struct.pack(">II", kind, len(data))) + 8
        yield from (Word(f"extension {kind:x}", at) for at in range(where, where + min(len(data), 24), 8))
        if kind == 0x23852875 and fields.get("autoclear_features", 0) & 1:
            directory = struct.unpack_from(">Q", data, 16)[0]
            yield from (Word("bitmap directory", at) for at in range(directory, directory + 24, 8))
            yield Word("bitmap table", word(image, directory))


def word(image: bytes, at: int) -> int:
    return int(struct.unpack_from(">Q", image.ljust(at + 8, b"\0"), at)[0])


def broken(draw: Random, old: int, bits: int, image: bytes, cluster_bits: int) -> int:
    """Another value for a word."""
    nclusters = (len(image) >> cluster_bits) + 1
    flags = old & ~OFFSET
    return draw.choice(
        [
            0,
            old ^ 1 << draw.randrange(bits),
            old ^ 1 << draw.randrange(bits),
            flags | draw.randrange(nclusters) << cluster_bits,
            flags | draw.randrange(nclusters) << cluster_bits,
            flags | (nclusters + 1000) << cluster_bits,
            old + 512,
            draw.getrandbits(bits),
        ]
    ) & ((1 << bits) - 1)


def verdict(command: list[str]) -> int:
    """The exit code; -1 if there is none of a check. Our tool runs in this process: there are many."""
    if command[0] == str(TOOL):
        try:
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                return main_of_tool(command[1:])
        except (Exception, SystemExit):
            traceback.print_exc()
            return -1
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return -1
    return done.returncode if done.returncode in (0, 1, 2, 3) and "Traceback" not in done.stderr else -1


def intact(files: Files, content: bytes) -> int:
    """How many pieces of the disk read as *content*."""
    try:
        with open_disk(files) as disk:
            return sum(reads_as(disk, at, content) for at in range(0, len(content), CLUSTERS_READ))
    except (OSError, qcow2.ImageError):
        return 0


def reads_as(disk: qcow2.Disk, at: int, content: bytes) -> bool:
    wanted = content[at : at + CLUSTERS_READ]
    try:
        return at + len(wanted) <= disk.size and disk.read(at, len(wanted)) == wanted
    except (OSError, qcow2.ImageError):
        return False


class Trial:
    """One image, broken again and again."""

    def __init__(self, feature: str, seed: int, qemus: list[Qemu]) -> None:
        self.draw = Random(f"damage {feature} {seed}")
        self.directory = Path(mkdtemp(prefix="damage-"))
        shape = draw_shape(self.draw, feature, depth=0)
        while shape.cluster_bits > 16:  # many copies are made
            shape = draw_shape(self.draw, feature, depth=0)
        life = Life(self.directory, shape, self.draw, qemus)
        life.lead(turns=2, nsteps=30)
        self.shape, self.files, self.content, self.qemus = shape, life.files, bytes(life.model.content), qemus
        self.image = self.files.path.read_bytes()
        self.header = read_header(self.files.path)
        self.words: dict[str, list[Word]] = {}
        for each in words_of(self.image, self.header):
            self.words.setdefault(each.what, []).append(each)

    def break_once(self) -> tuple[str, str, list[str]]:
        """What was broken, the verdicts, and in which ways we are worse."""
        what = self.draw.choice(sorted(self.words))
        target = self.draw.choice(self.words[what])
        bits = target.nbytes * 8
        old = word(self.image, target.offset) >> 64 - bits
        new = broken(self.draw, old, bits, self.image, self.header.fields["cluster_bits"])
        damaged = bytearray(self.image.ljust(target.offset + 8, b"\0"))
        damaged[target.offset : target.offset + target.nbytes] = new.to_bytes(target.nbytes, "big")
        told = f"{what} at {target.offset:#x}: {old:#x} -> {new:#x}"
        data = self.files.data.read_bytes() if self.shape.has_data_file else None
        commands = [self.command(None), *(self.command(qemu) for qemu in self.qemus)]
        self.files.path.write_bytes(damaged)
        codes, kept = [verdict(command) for command in commands], []
        for command in commands if any(codes) else []:
            self.files.path.write_bytes(damaged)
            if data is not None:
                self.files.data.write_bytes(data)
            verdict([*command[:2], "-r", "all", *command[2:]])
            kept.append(intact(self.files, self.content))
        self.files.path.write_bytes(self.image)
        return what, f"{told}: check {codes}, intact after repair {kept}", worse(codes, kept)

    def command(self, qemu: Qemu | None) -> list[str]:
        if qemu is None:
            return [str(TOOL), "check", str(self.files.path)]
        return [qemu.program("qemu-img"), "check", *self.files.secret(), self.files.named()]


def worse(codes: list[int], kept: list[int]) -> list[str]:
    """In which ways our verdict or repair, the first of each, is behind QEMU's."""
    found = []
    if codes[0] == -1:
        found.append("our check does not end well")
    if codes[0] == 0 and all(code not in (0, -1) for code in codes[1:]):
        found.append("we find nothing")
    if kept and kept[0] < max(kept[1:]):
        found.append("our repair leaves less of the disk")
    return found


def main() -> int:
    """The exit status: 1 if we are worse anywhere."""
    parser = argparse.ArgumentParser(prog="python -m tests.features.damage", description=__doc__)
    parser.add_argument("features", nargs="*", choices=[*FEATURES, []], help="default: all")
    parser.add_argument("--damages", type=int, default=200, help="of each")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    qemus = [Qemu(), *([Qemu(other)] if (other := os.environ.get("QEMU_BIN")) else [])]
    total: Counter[str] = Counter()
    for feature in given.features or FEATURES:
        done, seed, kinds = 0, given.seed, Counter[str]()
        while done < given.damages:
            trial = Trial(feature, seed, qemus)
            for _ in range(min(40, given.damages - done)):
                what, told, found = trial.break_once()
                kinds[what] += 1
                done += 1
                total.update(found)
                if found:
                    print(f"WORSE {feature} {trial.shape}, {told}: {', '.join(found)}", flush=True)
            shutil.rmtree(trial.directory)
            seed += 1
        print(
            f"{feature}: {done} damages ({', '.join(f'{n} {kind}' for kind, n in sorted(kinds.items()))})", flush=True
        )
    print(f"worse: {dict(total) or 'nowhere'}")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
