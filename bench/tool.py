"""``python -m bench.tool``: the `qcow2` tool and the library beside qemu-img, pair after pair on the same images.

``--peer`` names the other qemu-img (11.1 for the figures of docs/speed.md), ``--place`` a directory on the disk that is
meant. Sources are in the page cache, unless ``--cold``. Each row is the median of what they took and of the ratios.
``reads`` compares with what else reads qcow2 from Python, if it is there:
pip install dissect.hypervisor libqcow-python.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import qcow2

OURS = str(Path(sys.executable).parent / "qcow2")
MIB = 1 << 20
Words = list[str]


@dataclass
class Place:
    """Where images are made, each once."""

    root: Path
    peer: str
    nbytes: int  # of the disk that is converted
    is_cold: bool = False  # nothing of what is there is in the page cache when a run begins
    made: set[str] = field(default_factory=set)

    def get_ready(self) -> None:
        if not self.is_cold:
            return
        for path in self.root.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def qemu(self, *words: str) -> None:
        subprocess.run([self.peer, *words], cwd=self.root, check=True, stdout=subprocess.DEVNULL)

    def once(self, name: str, make: Callable[[Path], None]) -> str:
        if name not in self.made:
            make(self.root / name)
            self.made.add(name)
        return name

    def half(self) -> str:
        """A raw disk, half of it holes: a stretch of data that is half text, half noise, then a hole as long."""
        return self.once("half.raw", self._make_half)

    def _make_half(self, path: Path) -> None:
        with path.open("wb") as file:
            for offset in range(0, self.nbytes, 2 * MIB):
                file.seek(offset)
                text = b"".join(b"%015d\n" % (offset + number) for number in range(MIB // 32))
                file.write(text + os.urandom(MIB - len(text)))
            file.truncate(self.nbytes)

    def image(self) -> str:
        def make(path: Path) -> None:
            self.qemu("convert", "-f", "raw", "-O", "qcow2", self.half(), str(path))

        return self.once("half.qcow2", make)

    def full(self) -> str:
        """100 GiB that are all allocated, in a sparse file."""

        def make(path: Path) -> None:
            self.qemu("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path.name, "100G")

        return self.once("full", make)

    def uncounted(self) -> str:
        """The same, all refcounts 2."""

        def make(path: Path) -> None:
            subprocess.run(["cp", "--sparse=always", str(self.root / self.full()), str(path)], check=True)
            with path.open("r+b") as file:
                header = file.read(64)
                table, clusters = int.from_bytes(header[48:56], "big"), int.from_bytes(header[56:60], "big")
                file.seek(table)
                blocks = file.read(clusters << 16)
                for at in range(0, len(blocks), 8):
                    if block := int.from_bytes(blocks[at : at + 8], "big"):
                        file.seek(block)
                        counts = file.read(1 << 16)
                        file.seek(block)
                        file.write(counts.replace(b"\0\1", b"\0\2"))

        return self.once("uncounted", make)

    def sparse(self) -> str:
        """1 TiB with a little in many places."""

        def make(path: Path) -> None:
            self.qemu("create", "-q", "-f", "qcow2", path.name, "1T")
            with qcow2.open(path, writable=True) as disk:
                for number in range(20_000):
                    disk.write(number * (disk.size // 20_000) // 4096 * 4096, b"x" * 4096)

        return self.once("sparse", make)


@dataclass(frozen=True)
class Case:
    """A command line, of ours and of theirs, and what comes before each run, uncounted."""

    name: str
    wanted: str
    ours: Callable[[Place], Words]
    theirs: Callable[[Place], Words]
    before: Callable[[Place], None] = lambda place: None


def conversion(name: str, wanted: str, source: Callable[[Place], str], *words: str) -> Case:
    """As fast as each program can."""

    def line(place: Place, *more: str) -> Words:
        return ["convert", *words, *more, source(place), "out"]

    def forget(place: Place) -> None:
        (place.root / "out").unlink(missing_ok=True)

    return Case(name, wanted, lambda place: line(place, "-W"), lambda place: line(place, "-m", "16", "-W"), forget)


def same(
    name: str, wanted: str, words: Callable[[Place], Words], before: Callable[[Place], None] = lambda place: None
) -> Case:
    """The same words for both."""
    return Case(name, wanted, words, words, before)


def break_again(place: Place) -> None:
    """A fresh copy of the image whose counts are wrong."""
    subprocess.run(["cp", "--sparse=always", place.uncounted(), "broken"], cwd=place.root, check=True)


RAW, QCOW2 = ("-f", "raw", "-O", "qcow2"), ("-f", "qcow2", "-O", "raw")
CASES = [
    conversion("convert raw -> qcow2", ">= 1.2", Place.half, *RAW),
    conversion("convert qcow2 -> raw", ">= 1.2", Place.image, *QCOW2),
    conversion("convert raw -> qcow2, unsynced", ">= 1.2", Place.half, *RAW, "-t", "unsafe"),  # qemu-img's default
    conversion("convert qcow2 -> raw, unsynced", ">= 1.2", Place.image, *QCOW2, "-t", "unsafe"),
    conversion("convert -c zlib", ">= 1.5", Place.half, "-c", *RAW),
    conversion("convert -c zstd", ">= 1.5", Place.half, "-c", *RAW, "-o", "compression_type=zstd"),
    same("compare", ">= 1.2", lambda p: ["compare", "-f", "raw", "-F", "qcow2", p.half(), p.image()]),
    same("check 100 GiB", ">= 1", lambda p: ["check", "-f", "qcow2", p.full()]),
    same("check -r all", ">= 1", lambda p: ["check", "-q", "-f", "qcow2", "-r", "all", "broken"], break_again),
    same("map sparse", ">= 0.5", lambda p: ["map", "-f", "qcow2", "--output=json", p.sparse()]),
    same("info", "<= 0.1 s", lambda p: ["info", "-f", "qcow2", p.image()]),
    same("bench reads", "", lambda p: ["bench", "-f", "qcow2", p.image()]),
    same("bench writes", "", lambda p: ["bench", "-f", "qcow2", "-w", p.image()]),
]


class Took(NamedTuple):
    """Seconds."""

    passed: float
    worked: float  # of all processors


def took(program: str, words: Words, place: Place) -> Took:
    """What one run took."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([program, *words], cwd=place.root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    passed, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{program} {' '.join(words)}: exit {done.returncode}: {done.stderr.decode()[-500:]}")
    return Took(passed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def row(case: Case, place: Place, count: int) -> str:
    """A line of the table: the medians of *count* pairs, after one that warms up."""
    ours: list[Took] = []
    theirs: list[Took] = []
    for number in range(count + 1):
        for program, words, kept in ((OURS, case.ours, ours), (place.peer, case.theirs, theirs)):
            line = words(place)
            case.before(place)
            place.get_ready()
            if number:
                kept.append(took(program, line, place))
            else:
                took(program, line, place)
    ratios = sorted(their.passed / our.passed for our, their in zip(ours, theirs, strict=True))
    ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
    passed = " | ".join(f"{statistics.median(each.passed for each in kept):.3f} s" for kept in (ours, theirs))
    worked = " and ".join(f"{statistics.median(each.worked for each in kept):.3f}" for kept in (ours, theirs))
    return f"| {case.name} | {passed} | {ratio} | {worked} | {case.wanted} |"


Read = Callable[[int, int], bytes]  # (offset, nbytes)


@contextmanager
def reader_of_ours(path: Path) -> Iterator[Read]:
    """`Disk.read`."""
    with qcow2.open(path) as disk:
        yield disk.read


@contextmanager
def reader_of_dissect(path: Path) -> Iterator[Read]:
    """dissect.hypervisor. Raises: ImportError."""
    with path.open("rb") as file:
        disk: Any = import_module("dissect.hypervisor.disk.qcow2").QCow2(file)
        stream = disk.open() if hasattr(disk, "open") else disk  # older ones are the stream

        def read(offset: int, nbytes: int) -> bytes:
            stream.seek(offset)
            content: bytes = stream.read(nbytes)
            return content

        yield read


@contextmanager
def reader_of_libqcow(path: Path) -> Iterator[Read]:
    """libqcow. Raises: ImportError."""
    file: Any = import_module("pyqcow").file()
    file.open(str(path))
    try:
        yield lambda offset, nbytes: file.read_buffer_at_offset(nbytes, offset)
    finally:
        file.close()


READERS = {"Disk.read": reader_of_ours, "dissect.hypervisor": reader_of_dissect, "libqcow": reader_of_libqcow}


def reads(place: Place, count: int) -> list[str]:
    """Reading a warm image, in GB/s: one after the other, *count* times in turns after a first one that is not kept."""
    path = place.root / place.image()
    lines = []
    for nbytes in (64 << 10, 256 << 10, MIB, 4 * MIB):
        rates: dict[str, list[float]] = {}
        for number in range(count + 1):
            for name, reader in READERS.items():
                with suppress(ImportError), reader(path) as read:
                    found = rate(read, min(place.nbytes, 1 << 30), nbytes)
                    rates.setdefault(name, []).extend([found] if number else [])
        lines += [
            f"| {name}, {nbytes >> 10} KiB | {statistics.median(found):.2f} GB/s | - | - | - | ours: >= 1 GB/s |"
            for name, found in rates.items()
        ]
    return lines


def rate(read: Read, end: int, nbytes: int) -> float:
    """GB/s of reading all that is before *end*, data and holes, *nbytes* at a time."""
    started = time.perf_counter()
    for offset in range(0, end - nbytes + 1, nbytes):
        if len(read(offset, nbytes)) != nbytes:
            raise SystemExit(f"short read at {offset}")
    return end / (time.perf_counter() - started) / 1e9


def memory(place: Place) -> list[str]:
    """Resident memory at most, of disks of 1 TiB."""
    lines = []
    for words in (
        ["map", "-f", "qcow2", "--output=json", place.sparse()],
        ["check", "-f", "qcow2", place.sparse()],
        ["convert", "-f", "qcow2", "-O", "qcow2", place.sparse(), "out"],
        ["compare", "-f", "qcow2", "-F", "qcow2", place.sparse(), place.sparse()],
        ["measure", "-f", "qcow2", "-O", "qcow2", place.sparse()],
    ):
        found = [_peak(program, words, place) for program in (OURS, place.peer)]
        lines.append(f"| {words[0]} of 1 TiB, memory | {found[0] >> 10} MiB | {found[1] >> 10} MiB | - | - | bounded |")
    return lines


def _peak(program: str, words: Words, place: Place) -> int:
    child = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True); "
    child += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    done = subprocess.run(
        [sys.executable, "-c", child, program, *words], cwd=place.root, check=True, capture_output=True
    )
    return int(done.stdout)


def main() -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.tool", description=__doc__)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(case.name for case in CASES)}, reads, memory")
    parser.add_argument("--peer", default="qemu-img", help="the other program")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--size", type=int, default=4, help="GiB of the disk that is converted (default: 4)")
    parser.add_argument("--cold", action="store_true", help="sources are read from the disk each time")
    parser.add_argument("--place", help="where the images are made (default: the temporary directory)")
    given = parser.parse_args()
    with TemporaryDirectory(dir=given.place) as directory:
        place = Place(Path(directory), given.peer, given.size << 30, given.cold)
        print("| case | ours | qemu-img | times as fast | processor seconds | wanted |", flush=True)
        print("|---|---|---|---|---|---|", flush=True)
        for case in CASES:
            if not given.cases or case.name in given.cases:
                print(row(case, place, given.pairs), flush=True)
        if not given.cases or "reads" in given.cases:
            print("\n".join(reads(place, given.pairs)), flush=True)
        if not given.cases or "memory" in given.cases:
            print("\n".join(memory(place)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
