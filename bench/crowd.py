"""`python -m bench.crowd`: requests a second of our daemon while 1, 2, 4 ... 65,536 of them are under way.

Also for a second of its processor time, of which it gets less than there is where others are at work: who looks for a
fall looks there, unless the machine is idle.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from bench.case import Case, Images
from bench.comparison import Arena, our_daemon
from bench.ending import end_on_sigterm
from bench.load import Job, LoadFailure
from bench.machine import describe
from bench.measurement import Measurement
from bench.plot import NoPlots, draw_crowds
from bench.rows import FILLED, FRESH, GIB, OVERLAY
from bench.server import ServerFailure
from bench.watch import stopwatch
from vhost.option import CacheMode

CROWDS = tuple(1 << power for power in range(17))
RING = 1024  # entries: QEMU's largest
FLOOR = 0.8  # of the best figure, which no larger crowd may fall below
IMAGES, PLOT = Path(".cache"), Path("docs/crowd.svg")

CASES = (
    Case("overwrite", "warm overwrites", FILLED, Job(GIB), Images.PER_SERVER),
    Case("read", "warm reads", FILLED, Job(GIB, read_percent=100), Images.SHARED),
    Case("fresh", "writes to a fresh lazy image", FRESH, Job(FRESH.nbytes), Images.PER_RUN),
    Case("stable", "the same, writethrough", FRESH, Job(FRESH.nbytes), Images.PER_RUN, CacheMode.WRITETHROUGH),
    Case("direct", "the same, cache=none", FRESH, Job(FRESH.nbytes), Images.PER_RUN, CacheMode.NONE),
    Case("overlay", "first writes to clusters of an overlay", OVERLAY, Job(OVERLAY.nbytes), Images.PER_RUN),
)


@dataclass(frozen=True, slots=True)
class Options:
    """One run. *ring*: entries; larger crowds come on several queues."""

    cases: list[str]
    passes: int
    seconds: float
    ring: int
    largest: int
    directory: Path
    plot: Path


@dataclass(frozen=True, slots=True)
class Figure:
    """What one case showed with one crowd, over all passes."""

    crowd: int
    runs: tuple[Measurement, ...]

    @property
    def iops(self) -> list[float]:
        return [run.iops for run in self.runs]

    @property
    def rates(self) -> list[float]:
        """Requests for a second of the daemon's processor time."""
        return [1e5 / run.cpu_per_100k for run in self.runs]

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def others(self) -> float:
        """The share of the machine that others had, usually."""
        return statistics.median(run.others_busy for run in self.runs)


@dataclass(frozen=True, slots=True)
class Curve:
    """One case along all crowds."""

    case: Case
    figures: tuple[Figure, ...]

    def share_of_best(self, figure: Figure) -> float:
        """Of the best rate of a crowd no larger."""
        return figure.rate / max(other.rate for other in self.figures if other.crowd <= figure.crowd)

    @property
    def lowest(self) -> float:
        """The smallest of those shares."""
        return min(map(self.share_of_best, self.figures))


def parse(arguments: list[str] | None = None) -> Options:
    """Exits with a usage message if the command line is nonsense."""
    parser = argparse.ArgumentParser(prog="python -m bench.crowd", description=__doc__.splitlines()[0])
    add = parser.add_argument
    names = [case.name for case in CASES]
    add("cases", metavar="CASE", nargs="*", help=f"of {', '.join(names)}; default: all")
    add("--passes", type=int, default=5, help="over all cases and crowds (%(default)s)")
    add("--seconds", type=float, default=0.5, help="measured in every run (%(default)s)")
    add("--ring", type=int, default=RING, help="entries of a queue, of which larger crowds need several (%(default)s)")
    add("--largest", type=int, default=CROWDS[-1], help="crowd (%(default)s)")
    add("--directory", type=Path, default=IMAGES, help="images go here (%(default)s)")
    add("--plot", type=Path, default=PLOT, help="an SVG (%(default)s)")
    options = Options(**vars(parser.parse_args(arguments)))
    if unknown := set(options.cases) - set(names):
        parser.error(f"no case is called {', '.join(sorted(unknown))}")
    return options


def main() -> int:
    """Run all passes; 0 if every run ended well, whatever the figures."""
    options = parse()
    end_on_sigterm()
    try:
        curves = execute([case for case in CASES if not options.cases or case.name in options.cases], options)
    except (ServerFailure, LoadFailure, OSError, subprocess.CalledProcessError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print("\n".join(table(curves)))
    try:
        draw_crowds(curves, FLOOR, options.plot)
    except NoPlots as missing:
        print(f"bench: {missing}", file=sys.stderr)
    return 0


def execute(cases: Sequence[Case], options: Options) -> tuple[Curve, ...]:
    """Measure each crowd of each case once a pass, so that what drifts drifts under all of them."""
    crowds = [crowd for crowd in CROWDS if crowd <= options.largest]
    runs: dict[tuple[str, int], list[Measurement]] = {(case.name, crowd): [] for case in cases for crowd in crowds}
    say = stopwatch()
    with ExitStack() as stack:
        options.directory.mkdir(parents=True, exist_ok=True)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.directory, prefix="crowd-")))
        machine = describe(directory)
        say(f"{machine.processor}, {machine.cores} cores, Linux {machine.kernel}, {machine.file_system}")
        say(f"commit {machine.commit}, load average {machine.load_average}")
        arena = Arena(directory.resolve(), directory.resolve(), pairs=1, seconds=options.seconds)
        images: dict[str, dict[str, Path]] = {case.name: {} for case in cases}
        for number in range(options.passes):
            for crowd in crowds if number % 2 == 0 else reversed(crowds):
                for case in cases:
                    crowded = replace(case, job=crowd_job(case.job, crowd, options.ring))
                    run = arena.run(crowded, our_daemon(), images[case.name], options.seconds)
                    runs[case.name, crowd].append(run)
                    cost = f"{10 * run.cpu_per_100k:6.2f} us"
                    say(f"  {case.name:10} {crowd:6} {run.iops:12,.0f} {cost}, others {run.others_busy:.0%}")
    return tuple(Curve(case, tuple(Figure(crowd, tuple(runs[case.name, crowd])) for crowd in crowds)) for case in cases)


def crowd_job(job: Job, crowd: int, ring: int) -> Job:
    """*job* with *crowd* requests under way, on as many queues of *ring* entries as that takes."""
    queues = -(-crowd // ring)
    return replace(job, depth=crowd // queues, queues=queues)


def table(curves: Sequence[Curve]) -> Iterator[str]:
    """IOPS, and requests for a second of processor time: median, range, and the share of a smaller crowd's best."""
    columns = "IOPS | a second of processor time | of the best"
    yield "| under way | " + " | ".join(f"{curve.case.name}, {columns}" for curve in curves) + " |"
    yield "|--:|" + "--:|" * (3 * len(curves))
    for row in zip(*(curve.figures for curve in curves), strict=True):
        cells = [_cells(curve, figure) for curve, figure in zip(curves, row, strict=True)]
        yield f"| {row[0].crowd:,} | " + " | ".join(cells) + " |"
    yield ""
    for curve in curves:
        busy = statistics.median(figure.others for figure in curve.figures)
        verdict = "holds" if curve.lowest >= FLOOR else "falls"
        yield f"{curve.case.name}: at least {curve.lowest:.0%} of the best, {verdict}; others had {busy:.0%}"


def _cells(curve: Curve, figure: Figure) -> str:
    return f"{_spread(figure.iops)} | {_spread(figure.rates)} | {curve.share_of_best(figure):.0%}"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}-{max(values):,.0f})"


if __name__ == "__main__":
    sys.exit(main())
