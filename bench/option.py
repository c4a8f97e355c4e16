"""The benchmark's command line, parsed once."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from bench.server import QEMU

DEFAULT_PAIRS, DEFAULT_SECONDS = 5, 3.0


@dataclass(frozen=True, slots=True)
class Part:
    """The *number*th of *count* parts of what there is to measure, from 1."""

    number: int
    count: int

    def of(self, length: int) -> slice:
        """Where this part is of so many; all parts in turn are the whole."""
        return slice(length * (self.number - 1) // self.count, length * self.number // self.count)


@dataclass(frozen=True, slots=True)
class Options:
    """One run. Empty *patterns*: every case that belongs to no sweep."""

    patterns: list[str]
    part: Part
    pairs: int
    seconds: float
    directory: Path
    tmpfs: Path
    output: Path
    opponent: str
    ceiling: bool
    list_cases: bool


def parse(arguments: list[str] | None = None) -> Options:
    """Exits with a usage message if the command line is nonsense."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "patterns",
        metavar="CASE",
        nargs="*",
        help="of cases or of sweeps, * allowed; goals: what has a target; scale: what may be large; all: sweeps, too",
    )
    add("--part", type=_part, default=Part(1, 1), metavar="N/M", help="measure the Nth of M parts of the cases")
    add("--list", dest="list_cases", action="store_true", help="name every case and end")
    add("--pairs", type=_count, default=DEFAULT_PAIRS, help="runs of each server, in turns (%(default)s)")
    add("--seconds", type=_seconds, default=DEFAULT_SECONDS, help="measured in every run (%(default)s)")
    add("--directory", type=Path, default=Path(".cache"), help="images go here, on the disk to measure (%(default)s)")
    add("--tmpfs", type=Path, default=Path("/dev/shm"), help="and here for the cases on tmpfs (%(default)s)")
    add("--output", type=Path, default=Path("bench/results"), help="results.json, table.md, plots (%(default)s)")
    add("--opponent", default=QEMU, metavar="PROGRAM", help="a qemu-storage-daemon (%(default)s)")
    add("--no-ceiling", dest="ceiling", action="store_false", help="do not measure the disk alone")
    return Options(**vars(parser.parse_args(arguments)))


def _part(text: str) -> Part:
    number, slash, count = text.partition("/")
    if not slash or not (number.isdigit() and count.isdigit()) or not 1 <= int(number) <= int(count) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a part like 1/4, of at most 100")
    return Part(int(number), int(count))


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 1000")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.01 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time from 0.01 to 3600 seconds")
    return seconds
