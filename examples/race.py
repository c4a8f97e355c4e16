"""The demo's last part: the same durable writes from the host, to our daemon and to qemu-storage-daemon.

No guest is between them and the load: an emulated one is busy with itself, and hides what the servers can do.
"""

import shutil
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from xml.sax.saxutils import escape

from bench.counting import TRACE, Ending, leave_qemu, read_trace, stop_ours
from bench.load import Job, Order
from bench.measurement import Command, Measurement, measure
from bench.recipe import Kitchen, Recipe
from bench.server import Aio, ServerFailure, Service, our_command, qemu_command
from vhost.option import CacheMode

SECONDS = 10.0
TRACE_SECONDS = 1.0  # QEMU's fdatasyncs are counted in a run beside, because counting slows it down
# Clusters as large as the writes: with larger ones the images grow by gigabytes, and removing those takes a minute
# on a file system that is mounted with discard (ext4, clusters of 64 KiB: 14 GiB in 10 s, 31 s).
BLOCK, REGION = 4096, 2 << 30
IMAGE = Recipe(REGION, f"compat=1.1,lazy_refcounts=on,cluster_size={BLOCK}", name="fresh, clusters of 4 KiB")
JOB = Job(REGION, block_size=BLOCK, depth=32, order=Order.ONCE, stride=BLOCK)
TRACED_JOB = replace(JOB, nbytes=64 << 20)  # few L2 tables: in so short a run their allocation would count for too much
TITLE = "4 KiB writes in random order, each to a new cluster and stable when done, 32 at a time"
OURS, THEIRS = "vhost-user-qcow2", "qemu-storage-daemon"
BAR, NAME_WIDTH = 44, 21  # characters
NOTICEABLE = 1.2  # a ratio that one run tells from noise


@dataclass(frozen=True)
class Run:
    """What one server did; *syncs* are its fdatasyncs for 1,000 writes, None if nobody counted."""

    name: str
    measured: Measurement
    syncs: float | None


@dataclass(frozen=True)
class Race:
    """Both servers under the same load; *theirs* is None where QEMU's could not run, *absence* says why."""

    ours: Run
    theirs: Run | None
    absence: str = ""

    @property
    def runs(self) -> list[Run]:
        return [self.ours] if self.theirs is None else [self.ours, self.theirs]


def run_race(directory: Path, say: Callable[[str], None], *, seconds: float) -> Race:
    """Load each server for *seconds* on a fresh image in *directory*. Raises: ServerFailure, LoadFailure, OSError."""
    arena = _Arena(directory)
    say(f"{seconds:g} s without a guest: {OURS}")
    measured = arena.run(our_command, seconds, stop_ours)
    ours = Run(OURS, measured, measured.syncs_per_1000)
    if shutil.which(THEIRS) is None:
        return Race(ours, None, f"{THEIRS} not found: install the package qemu-system-common")
    say(f"{seconds:g} s without a guest: {THEIRS}")
    try:
        theirs = arena.run(partial(qemu_command, aio=Aio.THREADS), seconds, leave_qemu)
    except ServerFailure as failure:
        return Race(ours, None, str(failure))
    return Race(ours, Run(THEIRS, theirs, arena.count_syncs(min(seconds, TRACE_SECONDS))))


class _Arena:
    """Where the images are made, one for each run."""

    def __init__(self, directory: Path) -> None:
        self._kitchen = Kitchen(directory)

    def run(
        self, command: Callable[[Service, int], list[str]], seconds: float, end: Ending, job: Job = JOB
    ) -> Measurement:
        image = self._kitchen.path("race")
        self._kitchen.make(IMAGE, "race")
        start: Command = partial(command, Service(image, CacheMode.WRITETHROUGH))
        try:
            return measure(start, job, warm_up=0, seconds=seconds, end=end)
        finally:
            image.unlink()

    def count_syncs(self, seconds: float) -> float | None:
        """QEMU's fdatasyncs for 1,000 writes; its trace is complete with io_uring only, which may be forbidden."""
        try:
            return self.run(_traced, seconds, read_trace, TRACED_JOB).syncs_per_1000
        except ServerFailure:
            return None


def _traced(service: Service, fd: int) -> list[str]:
    return [*qemu_command(service, fd, Aio.IO_URING), *TRACE]


def print_race(race: Race, picture: Path) -> None:
    """A table, bars and what to conclude; *picture* gets the bars as SVG."""
    if race.absence:
        print(f"\n{race.absence}")
    print("", TITLE, "", *table(race), "", *bars(race), "", textwrap.fill(conclusion(race), 100), sep="\n")
    picture.write_text(drawn(race))
    print(f"The bars as a picture: {picture}", flush=True)


def table(race: Race) -> list[str]:
    """The lines of the table, its head first."""
    head = ("writes a second", "median", "99 of 100", "fdatasyncs a write")
    rows = [("", head), *((run.name, _cells(run)) for run in race.runs)]
    return [
        f"{name:{NAME_WIDTH}}{speed:>15}{median:>12}{most:>12}{syncs:>20}"
        for name, (speed, median, most, syncs) in rows
    ]


def _cells(run: Run) -> tuple[str, str, str, str]:
    measured = run.measured
    syncs = "not counted" if run.syncs is None else f"{run.syncs / 1000:.2f}"
    return f"{measured.iops:,.0f}", f"{measured.p50 / 1e3:.2f} ms", f"{measured.p99 / 1e3:.2f} ms", syncs


def bars(race: Race) -> list[str]:
    """A line for each server, as long as it is fast."""
    most = max(run.measured.iops for run in race.runs)
    return [
        f"{run.name:{NAME_WIDTH}}{'█' * max(1, round(BAR * run.measured.iops / most))} {run.measured.iops:,.0f}"
        for run in race.runs
    ]


def conclusion(race: Race) -> str:
    """One sentence: what to conclude and why."""
    if race.theirs is None:
        return "Conclusion: none, because there is nothing to compare with."
    ratio = race.ours.measured.iops / race.theirs.measured.iops
    if ratio >= NOTICEABLE:
        return f"Conclusion: {ratio:.1f} times QEMU's durable writes a second on this disk, because {_sharing(race)}."
    if ratio > 1 / NOTICEABLE:
        return (
            f"Conclusion: no difference that one run can show ({ratio:.2f} times QEMU's), because disk or processor"
            f" were the limit, although {_sharing(race)}."
        )
    return f"Conclusion: QEMU's daemon is {1 / ratio:.1f} times as fast on this disk, although {_sharing(race)}."


def _sharing(race: Race) -> str:
    ours, theirs = race.ours.syncs, race.theirs.syncs if race.theirs else None
    qemu = f", while QEMU makes {theirs / 1000:.2f} a write" if theirs else ""
    return f"{1000 / ours:.0f} of our writes share one fdatasync{qemu}" if ours else "no fdatasync was made"


def drawn(race: Race) -> str:
    """The bars as SVG."""
    most = max(run.measured.iops for run in race.runs)
    rows = [
        f'<text x="10" y="{62 + 40 * row}">{run.name}</text>'
        f'<rect x="185" y="{45 + 40 * row}" width="{400 * run.measured.iops / most:.0f}" height="26" fill="{color}"/>'
        f'<text x="{193 + 400 * run.measured.iops / most:.0f}" y="{62 + 40 * row}">{run.measured.iops:,.0f}</text>'
        for row, (run, color) in enumerate(zip(race.runs, ("#1f77b4", "#7f7f7f"), strict=False))
    ]
    font = 'font-family="sans-serif" font-size="14"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="800" height="130" style="background: white" {font}>'
    title = f'<text x="10" y="24">Writes a second: {escape(TITLE)}</text>'
    return "\n".join([head, title, *rows, "</svg>", ""])
