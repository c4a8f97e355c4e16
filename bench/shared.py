"""`python -m bench.shared`: what is left for guests that share the cores with a disk's server.

Busy processes stand for the vCPUs of other guests. In turns they run alone, beside our daemon under a load, beside
ours with polling off, and beside QEMU's: requests a second of the load, and the work of the busy ones as a share of
what they get done alone. A server that takes more processor time than it needs shows in the second figure.
"""

import argparse
import mmap
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

from bench.case import Case, UnknownCase, select
from bench.comparison import Arena, Contestant, our_daemon, qemu
from bench.ending import end_on_sigterm, ignore_signals
from bench.load import LoadFailure
from bench.machine import describe
from bench.rows import EXTRAS, ROWS
from bench.server import QEMU, Aio, ServerFailure
from bench.watch import stopwatch

CASES = ["read-1", "read-32", "overwrite-1", "overwrite-32"]
COUNTER = 8  # bytes of each process's own
ASLEEP = ("--poll-us=0",)


class Neighbours(AbstractContextManager["Neighbours"]):
    """*count* processes that work without end, and note how much."""

    def __init__(self, count: int) -> None:
        self._counters = mmap.mmap(-1, count * COUNTER)
        self._pids: list[int] = []
        self._count = count

    def __enter__(self) -> "Neighbours":
        for number in range(self._count):
            pid = os.fork()
            if not pid:
                self._work(memoryview(self._counters).cast("Q"), number)
            self._pids.append(pid)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _work(self, counters: memoryview, number: int) -> None:
        for signalled in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signalled, signal.SIG_DFL)
        while os.getppid() != 1:  # whoever started us has not died
            sum(range(5000))
            counters[number] += 1

    def moment(self) -> tuple[float, int]:
        """Now, and the pieces of work that are done."""
        return time.monotonic(), sum(memoryview(bytes(self._counters)).cast("Q"))

    def rate(self, since: tuple[float, int]) -> float:
        """Pieces of work a second since that moment."""
        (begin, before), (end, after) = since, self.moment()
        return (after - before) / (end - begin)


@dataclass(slots=True)
class Series:
    """One server under one load, over all passes."""

    rates: list[float] = field(default_factory=list)  # requests a second
    shares: list[float] = field(default_factory=list)  # of the work that is done without it


def main() -> int:
    """Measure and print; 0 if every run ended well, whatever the figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.shared", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("cases", metavar="CASE", nargs="*", help=f"names as of python -m bench; default: {', '.join(CASES)}")
    add("--neighbours", type=int, default=4, help="busy processes (%(default)s)")
    add("--passes", type=int, default=5, help="over all servers (%(default)s)")
    add("--seconds", type=float, default=3.0, help="measured in every run (%(default)s)")
    add("--directory", type=Path, default=Path(".cache"), help="images go here (%(default)s)")
    add("--opponent", default=QEMU, metavar="PROGRAM", help="a qemu-storage-daemon (%(default)s)")
    options = parser.parse_args()
    end_on_sigterm()
    try:
        cases = select(options.cases or CASES, (*ROWS, *EXTRAS))
        for line in execute(cases, options):
            print(line, flush=True)
    except (UnknownCase, ServerFailure, LoadFailure, OSError, subprocess.CalledProcessError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def execute(cases: Sequence[Case], options: argparse.Namespace) -> Iterator[str]:
    """The lines of the table."""
    options.directory.mkdir(parents=True, exist_ok=True)
    say = stopwatch()
    with ExitStack() as stack:
        place = Path(
            stack.enter_context(tempfile.TemporaryDirectory(dir=options.directory, prefix="shared-"))
        ).resolve()
        stack.callback(ignore_signals)
        say(str(describe(place, options.opponent)))
        neighbours = stack.enter_context(Neighbours(options.neighbours))
        arena = Arena(place, place, pairs=1, seconds=options.seconds)
        yield "| case | server | IOPS | the others' work |"
        yield "|---|---|--:|--:|"
        for case in cases:
            for name, series in compare(case, arena, neighbours, options).items():
                yield f"| {case.title} | {name} | {spread(series.rates, ',.0f')} | {spread(series.shares, '.1%')} |"
            say(case.name)


def compare(case: Case, arena: Arena, neighbours: Neighbours, options: argparse.Namespace) -> dict[str, Series]:
    """*case* on each server in turns."""
    contestants: dict[str, tuple[Contestant, Case]] = {
        "ours": (our_daemon(), case),
        "ours, polling off": (our_daemon(), replace(case, options=(*case.options, *ASLEEP))),
        "QEMU": (qemu(Aio.IO_URING, options.opponent), case),
    }
    found = {name: Series() for name in contestants}
    images: dict[str, Path] = {}
    for contestant, one in contestants.values():  # images are made, and what the disk holds of them is in memory
        arena.run(one, contestant, images, options.seconds)
    for _ in range(options.passes):
        before = neighbours.moment()
        alone = 0.0
        while not alone:  # one that is crowded out for as long as that
            time.sleep(options.seconds)
            alone = neighbours.rate(before)
        for name, (contestant, one) in contestants.items():
            before = neighbours.moment()
            found[name].rates.append(arena.run(one, contestant, images, options.seconds).iops)
            found[name].shares.append(neighbours.rate(before) / alone)
    return found


def spread(values: Sequence[float], style: str) -> str:
    """The median and the range."""
    return f"{statistics.median(values):{style}} ({min(values):{style}}-{max(values):{style}})"


if __name__ == "__main__":
    sys.exit(main())
