"""`python -m bench.second`: rows of the benchmark once more, with a client that is not ours.

`qemu-img bench` of QEMU 8 or later speaks vhost-user-blk through libblkio. It walks in large steps, which visit every
block once before the first comes again: as good as random. Pairs in turns, as everywhere.
"""

import argparse
import re
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from bench.case import Case, UnknownCase, select
from bench.comparison import Arena, Contestant, our_daemon, qemu
from bench.ending import end_on_sigterm, ignore_signals
from bench.load import Order
from bench.machine import command_line, describe
from bench.ratio import Ratio
from bench.report import figure, row
from bench.rows import EXTRAS, ROWS
from bench.server import QEMU, Aio, Server, ServerFailure
from bench.watch import stopwatch

CASES = ["writethrough-fresh-32", "writethrough-overwrite-32", "read-1", "read-32", "overwrite-32", "overlay-write-32"]
STEP = 0x278DDE6E  # bytes, of which an odd number of blocks: sizes are powers of two
TRIAL = 500  # requests, after which the rate is known well enough to say how many make a run
TOOK = re.compile(r"Run completed in ([\d.]+) seconds")
TIMEOUT = 300  # seconds
AIOS = (Aio.IO_URING, Aio.THREADS)


class Client:
    """`qemu-img bench` with the load of *case*, on the server at *path*."""

    def __init__(self, program: str, case: Case, path: Path) -> None:
        self._program = program
        self._job = case.job
        self._disk = f"driver=virtio-blk-vhost-user,path={path},cache.direct=on"
        self._step = case.job.stride if case.job.order is Order.ONCE else _step(case.job.block_size)
        self._done = 0

    def rate(self, seconds: float) -> float:
        """Requests a second over about so many *seconds*, or until every block was visited."""
        blocks = self._job.nbytes // (self._step if self._job.order is Order.ONCE else self._job.block_size)
        count = min(round(seconds * self._run(TRIAL)), blocks - self._done)
        return self._run(max(count, TRIAL))

    def _run(self, count: int) -> float:
        job = self._job
        words = ["-w"] if job.read_percent == 0 else []
        first = self._done * self._step % job.nbytes
        self._done += count
        done = subprocess.run(
            [
                *(self._program, "bench", "--image-opts", "-t", "none", *words),
                *(f"-c{count}", f"-d{job.depth}", f"-s{job.block_size}", f"-S{self._step}", f"-o{first}", self._disk),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        if done.returncode or not (took := TOOK.search(done.stdout)):
            raise ServerFailure(f"{self._program} bench: {done.stderr.strip() or done.stdout.strip()}")
        return count / float(took[1])


def _step(block_size: int) -> int:
    return (STEP // block_size | 1) * block_size


class Ring:
    """Both servers in turns, in front of that client."""

    def __init__(self, arena: Arena, place: Path, options: argparse.Namespace) -> None:
        self._arena = arena
        self._socket = place / "socket"
        self._options = options

    def compare(self, case: Case) -> tuple[list[float], list[float], Aio]:
        """Rates of ours and of QEMU's, with whichever way to the disk is its faster one."""
        images: dict[str, Path] = {}
        try:
            trials = {aio: self._run(case, qemu(aio, self._options.opponent), images) for aio in AIOS}
            aio = max(AIOS, key=lambda aio: trials[aio])
            rates: tuple[list[float], list[float]] = [], []
            for _ in range(self._options.pairs):
                for contestant, found in zip((our_daemon(), qemu(aio, self._options.opponent)), rates, strict=True):
                    found.append(self._run(case, contestant, images))
            return *rates, aio
        finally:
            self._arena.clear_all(case, images)

    def _run(self, case: Case, contestant: Contestant, images: dict[str, Path]) -> float:
        service = self._arena.service(case, contestant, images)
        listening = socket.socket(socket.AF_UNIX)
        try:
            listening.bind(str(self._socket))
            listening.listen(1)
            with Server(contestant.command(service, listening.fileno()), listening):
                return Client(self._options.client, case, self._socket).rate(self._options.seconds)
        finally:
            listening.close()
            self._socket.unlink(missing_ok=True)
            self._arena.clear(case, contestant, images)


def main() -> int:
    """Measure and print; 0 if every run ended well, whatever the figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.second", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("cases", metavar="CASE", nargs="*", help=f"names as of python -m bench; default: {', '.join(CASES)}")
    add("--pairs", type=int, default=5, help="runs of each server, in turns (%(default)s)")
    add("--seconds", type=float, default=1.0, help="about as long is each run (%(default)s)")
    add("--directory", type=Path, default=Path(".cache"), help="images go here (%(default)s)")
    add("--opponent", default=QEMU, metavar="PROGRAM", help="a qemu-storage-daemon (%(default)s)")
    add("--client", default="qemu-img", metavar="PROGRAM", help="a qemu-img with libblkio (%(default)s)")
    options = parser.parse_args()
    end_on_sigterm()
    try:
        cases = select(options.cases or CASES, (*ROWS, *EXTRAS))
        for line in execute(cases, options):
            print(line, flush=True)
    except (UnknownCase, ServerFailure, OSError, subprocess.SubprocessError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def execute(cases: Sequence[Case], options: argparse.Namespace) -> Iterator[str]:
    """The lines of the table."""
    options.directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.directory, prefix="second-")))
        stack.callback(ignore_signals)
        stopwatch()(str(describe(place, options.opponent)))
        arena = Arena(place.resolve(), place.resolve(), pairs=options.pairs, seconds=options.seconds)
        ring = Ring(arena, place, options)
        yield f"`{command_line('bench.second')}`"
        yield ""
        yield "| case, by qemu-img bench | ours, IOPS | QEMU, IOPS | ratio |"
        yield "|---|--:|--:|--:|"
        for case in cases:
            ours, theirs, aio = ring.compare(case)
            mine, other = (figure(statistics.median(rates)) for rates in (ours, theirs))
            yield row([case.title, mine, f"{other} ({aio.value})", str(Ratio.of_pairs(ours, theirs))])


if __name__ == "__main__":
    sys.exit(main())
