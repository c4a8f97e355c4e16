"""One case on both servers, in turns: A B A B, so that what drifts drifts under both."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path

from bench.case import Case, Images
from bench.counting import TRACE, Ending, leave_qemu, read_trace, stop_ours
from bench.idle import idle_share
from bench.load import Job
from bench.measurement import Command, Measurement, measure
from bench.recipe import Kitchen, Recipe, data_path
from bench.rows import GIB
from bench.server import QEMU, Aio, Service, our_command, qemu_command
from vhost.option import CacheMode

IDLE = Recipe(GIB, name="fresh, 1 GiB")
IDLE_JOB = Job(IDLE.nbytes, read_percent=50, depth=8, queues=2)
WARM_UP = 0.5  # seconds, or as long as the run if that is shorter
TRIAL = 1.0  # seconds for each way of QEMU to reach the disk


@dataclass(frozen=True, slots=True)
class Contestant:
    """A server by name, how to start it on an image and how to end it."""

    name: str
    command: Callable[[Service, int], list[str]]
    end: Ending


@dataclass(frozen=True, slots=True)
class Comparison:
    """A case and its pairs of runs, as they happened.

    *trials* are QEMU's IOPS by aio, of which *aio* was best. *traced* is one run of QEMU beside the pairs, of which
    only the counts of syncs and metadata writes mean anything; None if the case writes nothing.
    """

    case: Case
    aio: Aio
    trials: dict[str, float]
    ours: tuple[Measurement, ...]
    theirs: tuple[Measurement, ...]
    traced: Measurement | None


def our_daemon() -> Contestant:
    return Contestant("ours", our_command, stop_ours)


def qemu(aio: Aio, program: str = QEMU) -> Contestant:
    return Contestant("qemu", lambda service, fd: qemu_command(service, fd, aio, program), leave_qemu)


def traced_qemu(program: str) -> Contestant:
    """QEMU's daemon telling what it asks of the disk; its speed counts for nothing."""
    return Contestant(
        "qemu", lambda service, fd: [*qemu_command(service, fd, Aio.IO_URING, program), *TRACE], read_trace
    )


def _exchange(case: Case, images: dict[str, Path]) -> None:
    """Let each server have the other's image: of two copies that are overwritten the first made is the slower one."""
    if case.images is Images.PER_SERVER:
        images.update(zip(images, [*images.values()][::-1], strict=True))


class Arena:
    """Where cases run: a directory on a disk and one on tmpfs."""

    def __init__(self, disk: Path, tmpfs: Path, *, pairs: int, seconds: float, opponent: str = QEMU) -> None:
        self._kitchens = {False: Kitchen(disk), True: Kitchen(tmpfs)}
        self._pairs = pairs
        self._seconds = seconds
        self._opponent = opponent
        self._seeds = count(1)

    def compare(self, case: Case, say: Callable[[str], None]) -> Comparison:
        """Run *case* on both servers. Raises: ServerFailure, LoadFailure, CalledProcessError."""
        images: dict[str, Path] = {}
        try:
            aio, trials = self._choose_aio(case, images)
            say(f"  qemu with aio={aio.value} ({', '.join(f'{name} {iops:,.0f}' for name, iops in trials.items())})")
            ours, theirs = [], []
            for _ in range(self._pairs):
                ours.append(self.run(case, our_daemon(), images, self._seconds))
                theirs.append(self.run(case, qemu(aio, self._opponent), images, self._seconds))
                say(f"  {ours[-1].iops:12,.0f} {theirs[-1].iops:12,.0f}  {ours[-1].iops / theirs[-1].iops:6.2f} x")
                _exchange(case, images)
            traced = self._trace(case, images) if case.job.read_percent < 100 else None
            return Comparison(case, aio, trials, tuple(ours), tuple(theirs), traced)
        finally:
            self.clear_all(case, images)

    def watch_idle(self, seconds: float) -> dict[str, float]:
        """The share of one core that each server takes while it is connected and idle."""
        kitchen = self._kitchens[False]
        image = kitchen.path("idle")
        try:
            kitchen.make(IDLE, "idle")
            service = Service(image, CacheMode.WRITEBACK, queues=IDLE_JOB.queues)
            return {
                contestant.name: idle_share(partial(contestant.command, service), IDLE_JOB, seconds)
                for contestant in (our_daemon(), qemu(Aio.IO_URING, self._opponent))
            }
        finally:
            image.unlink(missing_ok=True)

    def _choose_aio(self, case: Case, images: dict[str, Path]) -> tuple[Aio, dict[str, float]]:
        """Try each way of QEMU to reach the disk -> the fastest for this case, and the IOPS of all."""
        ways = [Aio.IO_URING, Aio.THREADS, *([Aio.NATIVE] if case.cache.direct else [])]
        if case.on_tmpfs and case.cache.direct:
            ways.remove(Aio.NATIVE)
        trials = {
            way: self.run(case, qemu(way, self._opponent), images, min(TRIAL, self._seconds)).iops for way in ways
        }
        return max(ways, key=lambda way: trials[way]), {way.value: iops for way, iops in trials.items()}

    def _trace(self, case: Case, images: dict[str, Path]) -> Measurement:
        return self.run(case, traced_qemu(self._opponent), images, min(TRIAL, self._seconds), warm_up=False)

    def run(
        self, case: Case, contestant: Contestant, images: dict[str, Path], seconds: float, *, warm_up: bool = True
    ) -> Measurement:
        """One run of one server; *images* are those that live on, by name. Raises: ServerFailure, LoadFailure."""
        service = self.service(case, contestant, images)
        command: Command = lambda fd: contestant.command(service, fd)  # noqa: E731
        job = replace(case.job, seed=next(self._seeds))  # or a run would find the pages warm that the last one touched
        try:
            warming = min(WARM_UP, seconds) if warm_up and case.warms_up else 0
            return measure(command, job, warm_up=warming, seconds=seconds, end=contestant.end)
        finally:
            self.clear(case, contestant, images)

    def service(self, case: Case, contestant: Contestant, images: dict[str, Path]) -> Service:
        """What *contestant* is to serve in its next run. What was written before is on the disk, and no part of it."""
        image = self._image(case, contestant, images)
        key = self._kitchens[case.on_tmpfs].key if case.recipe.is_encrypted else None
        data_file = data_path(image) if case.recipe.has_data_file else None
        os.sync()
        return Service(image, case.cache, case.job.queues, case.writable, case.options, data_file, key)

    def clear(self, case: Case, contestant: Contestant, images: dict[str, Path]) -> None:
        """After a run: an image that serves for one goes."""
        if case.images is Images.PER_RUN:
            self._kitchens[case.on_tmpfs].remove(images.pop(contestant.name))

    def clear_all(self, case: Case, images: dict[str, Path]) -> None:
        """After the last."""
        for image in images.values():
            self._kitchens[case.on_tmpfs].remove(image)

    def _image(self, case: Case, contestant: Contestant, images: dict[str, Path]) -> Path:
        """The image of this run; entered in *images* before it is made, so that half an image is removed, too."""
        key = "shared" if case.images is Images.SHARED else contestant.name
        if key not in images:
            kitchen = self._kitchens[case.on_tmpfs]
            images[key] = kitchen.path(key)
            kitchen.make(case.recipe, key)
        return images[key]
