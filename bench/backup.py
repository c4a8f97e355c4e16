"""`python -m bench.backup`: a disk is backed up while its guest writes, by our daemon and by QEMU's, in turns.

The image is full of noise, and both use the same one. The guest writes 4 KiB at random, for `--seconds` before the
backup and until it ends. A backup lasts until the copy is stable: ours until the job is completed, QEMU's until
`blockdev-backup` is and its target is deleted, which flushes it. Ratios are of each pass; their median counts.
"""

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.ending import end_on_sigterm, ignore_signals
from bench.frontend import FrontEnd
from bench.load import Job, Load, Outcome, memory_nbytes
from bench.machine import describe
from bench.nbd import make_image
from bench.qmp import Message, Monitor, monitor_options
from bench.ratio import Ratio
from bench.recipe import run, warm
from bench.server import QEMU, Aio, Server, Service, connect, listen, our_command, qemu_command
from vhost import Control
from vhost.option import CacheMode

GIB = 1 << 30
STEP = 0.05  # seconds, between two looks whether the backup has ended
WARM = 0.5  # seconds
PATIENCE = 3600.0  # seconds, with a backup

Take = Callable[[Path], None]
Serve = Callable[[ExitStack], AbstractContextManager[tuple[str, Take]]]


@dataclass(frozen=True, slots=True)
class Found:
    """One backup: the guest before and during it, and how long it took."""

    before: Outcome | None  # None: nobody writes
    during: Outcome | None
    seconds: float


@contextmanager
def ours(image: Path, stack: ExitStack) -> Iterator[tuple[str, Take]]:
    """Our daemon: its address, and what takes a backup."""
    listening, address = listen()
    service = Service(image, CacheMode.WRITEBACK, options=(f"--control={image}.control",))
    server = stack.enter_context(Server(our_command(service, listening.fileno()), listening))

    def take(target: Path) -> None:
        with Control(f"{image}.control") as control:
            job = control.wait(control.backup(str(target)).job)
        if job.state != "completed":
            raise RuntimeError(f"the backup has {job.state}: {job.error}")

    yield address, take
    server.stop()


@contextmanager
def qemus(image: Path, stack: ExitStack, nbytes: int, program: str) -> Iterator[tuple[str, Take]]:
    """qemu-storage-daemon, and blockdev-backup.

    Its export has no I/O thread: with one, QEMU 11.1 begins no backup; it aborts (`bdrv_insert_node`), or, where the
    thread is fixed and a guest writes, both threads wait for ever.
    """
    listening, address = listen()
    path, service = image.with_suffix(".monitor"), Service(image, CacheMode.WRITEBACK)
    command = qemu_command(service, listening.fileno(), Aio.IO_URING, program, has_io_thread=False)
    server = stack.enter_context(Server([*command, *monitor_options(path)], listening))

    def take(target: Path) -> None:
        run("qemu-img", "create", "-q", "-f", "qcow2", target, nbytes)
        file: dict[str, Any] = {"driver": "file", "filename": str(target), "aio": Aio.IO_URING.value}
        monitor.ask("blockdev-add", driver="qcow2", node_name="target", file=file)
        monitor.ask("blockdev-backup", job_id="backup", device="disk", target="target", sync="full")
        data = monitor.wait_for(has_ended)["data"]
        if "error" in data:
            raise RuntimeError(data["error"])
        monitor.ask("blockdev-del", node_name="target")

    with Monitor(path, PATIENCE) as monitor:
        yield address, take
    server.stop()


def has_ended(event: Message) -> bool:
    """Whether it tells the end of the backup."""
    return event.get("event") == "BLOCK_JOB_COMPLETED"


def measure_both(servers: list[Serve], image: Path, job: Job, seconds: float, *, is_first: bool) -> tuple[Found, Found]:
    """A backup by each of the two, of an image that the host has read just before; ours *is_first* or last."""
    found: dict[int, Found] = {}
    for number in (0, 1) if is_first else (1, 0):
        warm(image)
        found[number] = measure(servers[number], image.with_name("copy.qcow2"), job, seconds)
    return found[0], found[1]


def measure(serve: Serve, target: Path, job: Job, seconds: float) -> Found:
    """One backup to *target*, which is removed; with *seconds* of 0 nobody writes."""
    try:
        with ExitStack() as stack:
            address, take = stack.enter_context(serve(stack))
            front_end = stack.enter_context(
                FrontEnd(connect(address), queues=1, nbytes=memory_nbytes(job), depth=job.depth)
            )
            if not seconds:
                return Found(None, None, timed(lambda: take(target)))
            load = stack.enter_context(Load(job, front_end))
            load.run(WARM)
            load.reset()
            load.run(seconds)
            before = load.outcome()
            load.reset()
            taken = while_taken(load, lambda: take(target))
            found = Found(before, load.outcome(), taken)
            load.drain()
            return found
    finally:
        target.unlink(missing_ok=True)


def timed(take: Callable[[], None]) -> float:
    """Seconds that it takes."""
    began = time.monotonic()
    take()
    return time.monotonic() - began


def while_taken(load: Load, take: Callable[[], None]) -> float:
    """Go on with the load until the backup is taken -> its seconds. Raises what taking it raised."""
    taken: Future[float] = Future()

    def command() -> None:
        try:
            taken.set_result(timed(take))
        except BaseException as error:
            taken.set_exception(error)

    threading.Thread(target=command, daemon=True).start()  # who is told to end does not wait for it
    while not taken.done():
        load.run(STEP)
    return taken.result()


def told(name: str, found: Sequence[Found], nbytes: int) -> str:
    """The line of one server."""
    seconds = [each.seconds for each in found]
    middle = statistics.median(seconds)
    line = (
        f"{name:7} {middle:6.1f} s ({min(seconds):.1f} to {max(seconds):.1f}), {nbytes / middle / (1 << 20):5.0f} MiB/s"
    )
    for what, outcomes in (("before", [each.before for each in found]), ("during", [each.during for each in found])):
        there = [outcome for outcome in outcomes if outcome is not None]
        if there:
            iops = statistics.median(outcome.iops for outcome in there)
            slow = statistics.median(outcome.latencies.percentile(99) for outcome in there) / 1e6
            line += f"; {what} {iops:7.0f} writes/s, p99 {slow:.1f} ms"
    return line


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.backup", description=__doc__)
    parser.add_argument("--gib", type=float, default=20, help="size of the disk (%(default)s)")
    parser.add_argument("--passes", type=int, default=3, help="backups of each (%(default)s)")
    parser.add_argument("--seconds", type=float, default=5, help="before each backup; 0: nobody writes (%(default)s)")
    parser.add_argument("--depth", type=int, default=32, help="requests of the guest at a time (%(default)s)")
    parser.add_argument("--directory", type=Path, default=Path(".cache"), help="images go here (%(default)s)")
    parser.add_argument("--opponent", default=QEMU, metavar="PROGRAM", help="a qemu-storage-daemon (%(default)s)")
    given = parser.parse_args()
    nbytes = int(given.gib * GIB) & -(1 << 20)
    end_on_sigterm()
    given.directory.mkdir(parents=True, exist_ok=True)
    print(describe(given.directory, given.opponent), flush=True)
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=given.directory, prefix="backup-"))).resolve()
        stack.callback(ignore_signals)
        image = place / "disk.qcow2"
        make_image(image, nbytes)
        servers: list[Serve] = [partial(ours, image), partial(qemus, image, nbytes=nbytes, program=given.opponent)]
        found: list[tuple[Found, Found]] = []
        for number in range(given.passes):
            job = Job(nbytes, depth=given.depth, seed=number + 1)
            found.append(measure_both(servers, image, job, given.seconds, is_first=number % 2 == 0))
    mine, other = zip(*found, strict=True)
    print(told("ours", mine, nbytes))
    print(told("QEMU's", other, nbytes))
    print("seconds, ours to QEMU's:", Ratio.of_pairs(*([each.seconds for each in side] for side in (mine, other))))
    if given.seconds:
        iops = [[each.during.iops for each in side if each.during] for side in (mine, other)]
        print("writes/s during it, ours to QEMU's:", Ratio.of_pairs(*iops))
    return 0


if __name__ == "__main__":
    sys.exit(main())
