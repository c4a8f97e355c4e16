"""`python -m bench.pause`: how long a guest's requests take while snapshots of its disk are taken, ours and QEMU's.

Or, with `--action`, while something else is done to it that makes requests wait, ours alone. 4 KiB random writes at
depth 32, page cache warm. Of each snapshot the slowest request counts, and beside it the slowest one of as long a time
right before. After a few snapshots the image and its overlays are removed and the server begins anew, so that they take
little more than `SNAPSHOTS * DISK` bytes; after `--seconds` it ends with what it has.
"""

import argparse
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench.ending import end_on_sigterm, ignore_signals
from bench.frontend import FrontEnd
from bench.load import Job, Load, memory_nbytes
from bench.qmp import Monitor, monitor_options
from bench.server import Aio, Server, Service, connect, listen, our_command, qemu_command
from qcow2 import create
from vhost import Control
from vhost.option import CacheMode

DISK = 64 << 20
SNAPSHOTS = 10  # of one image, each of which may grow to all of the disk
JOB = Job(DISK, depth=32)
WARM = 0.5  # seconds
STEP = 0.01  # seconds, between two looks whether the snapshot is taken
AFTER = 0.05  # seconds that count as well
PATIENCE = 20.0  # seconds, with a QEMU that takes a snapshot
LONGEST = 60.0  # seconds that a QEMU serves one image; then it is killed: some neither answer nor end

Take = Callable[[str], None]
Serve = Callable[[Path, ExitStack], AbstractContextManager[tuple[str, Take]]]
ACTIONS: dict[str, Callable[[Control, str], object]] = {
    "snapshot": lambda control, name: control.snapshot(name),
    "snapshot-with-bitmaps": lambda control, name: control.snapshot(name, carry_bitmaps=True),
    "snapshot-internal": lambda control, name: control.internal_snapshots.create(name),
    "bitmap-add": lambda control, name: control.bitmaps.add(name),
}


@dataclass(frozen=True, slots=True)
class Found:
    """Milliseconds, of each snapshot."""

    slowest: list[float] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    commands: list[float] = field(default_factory=list)


@contextmanager
def ours(image: Path, stack: ExitStack, action: str) -> Iterator[tuple[str, Take]]:
    """Our daemon: its address, and what acts on it."""
    listening, address = listen()
    service = Service(image, CacheMode.WRITEBACK, options=(f"--control={image}.control",))
    stack.enter_context(Server(our_command(service, listening.fileno()), listening))

    def take(name: str) -> None:
        with Control(f"{image}.control") as control:
            ACTIONS[action](control, name)

    yield address, take


@contextmanager
def qemus(image: Path, stack: ExitStack) -> Iterator[tuple[str, Take]]:
    """qemu-storage-daemon, and blockdev-snapshot-sync."""
    listening, address = listen()
    path = image.with_suffix(".monitor")
    command = qemu_command(Service(image, CacheMode.WRITEBACK), listening.fileno(), Aio.IO_URING)
    server = stack.enter_context(Server([*command, *monitor_options(path)], listening))
    watchdog = threading.Timer(LONGEST, os.kill, (server.pid, signal.SIGKILL))
    watchdog.daemon = True
    stack.callback(watchdog.cancel)  # before the server is waited for, and its number may be another's
    watchdog.start()
    nodes = ["disk"]

    def take(name: str) -> None:
        file = str(image.with_name(name))
        monitor.ask(
            "blockdev-snapshot-sync", node_name=nodes[-1], snapshot_file=file, format="qcow2", snapshot_node_name=name
        )
        nodes.append(name)

    with Monitor(path, PATIENCE) as monitor:
        yield address, take


def measure(snapshots: int, seconds: float, server: Serve, directory: Path, found: Found) -> None:
    """Take them, on one image after another, until *seconds* are over: *found* has what was, also when this raises."""
    ends_at = time.monotonic() + seconds
    while len(found.slowest) < snapshots and time.monotonic() < ends_at:
        with tempfile.TemporaryDirectory(dir=directory) as mine:
            image = Path(mine).resolve() / "disk.qcow2"
            create(image, DISK, lazy_refcounts=True)
            measure_image(image, min(SNAPSHOTS, snapshots - len(found.slowest)), ends_at, server, found)


def measure_image(image: Path, snapshots: int, ends_at: float, server: Serve, found: Found) -> None:
    """Take them, a twentieth of a second apart."""
    with ExitStack() as stack:
        address, take = stack.enter_context(server(image, stack))
        front_end = stack.enter_context(
            FrontEnd(connect(address), queues=1, nbytes=memory_nbytes(JOB), depth=JOB.depth)
        )
        load = stack.enter_context(Load(JOB, front_end))
        load.run(WARM)
        seconds = 0.1
        for number in range(snapshots):
            if time.monotonic() >= ends_at:
                break
            found.before.append(slowest(load, partial(load.run, seconds)))
            began = time.monotonic()
            found.slowest.append(slowest(load, partial(while_taken, load, partial(take, f"s{number}"), found)))
            seconds = time.monotonic() - began
        load.drain()


def slowest(load: Load, run: Callable[[], Any]) -> float:
    """Milliseconds that the slowest request took."""
    load.reset()
    run()
    return load.outcome().latencies.percentile(100) / 1e6


def while_taken(load: Load, take: Callable[[], None], found: Found) -> None:
    """Go on with the load until the snapshot is taken, and a little longer. Raises what taking it raised."""
    taken: Future[float] = Future()

    def command() -> None:
        began = time.monotonic()
        try:
            take()
        except BaseException as error:
            taken.set_exception(error)
        else:
            taken.set_result(1e3 * (time.monotonic() - began))

    threading.Thread(target=command, daemon=True).start()  # who is told to end does not wait for it
    while not taken.done():
        load.run(STEP)
    found.commands.append(taken.result())
    load.run(AFTER)


def told(what: str, values: list[float]) -> str:
    """Its line: how many there are, and where they lie."""
    if len(values) < 2:
        return f"{what}: {values}"
    quantiles = statistics.quantiles(values, n=100, method="inclusive")
    named = {"median": quantiles[49], "p90": quantiles[89], "p99": quantiles[98], "max": max(values)}
    return f"{what}, {len(values)}, ms: " + ", ".join(f"{name} {value:.2f}" for name, value in named.items())


def main() -> int:
    """Print the figures of each server."""
    parser = argparse.ArgumentParser(prog="python -m bench.pause", description=__doc__)
    parser.add_argument("--snapshots", type=int, default=100, help="%(default)s")
    parser.add_argument("--seconds", type=float, default=40, help="of each server, at most (%(default)s)")
    parser.add_argument("--directory", type=Path, default=Path(".cache"), help="images go here (%(default)s)")
    parser.add_argument("--action", choices=ACTIONS, default="snapshot", help="%(choices)s (%(default)s)")
    given = parser.parse_args()
    end_on_sigterm()
    given.directory.mkdir(parents=True, exist_ok=True)
    servers: list[tuple[str, Serve]] = [("ours", partial(ours, action=given.action))]
    if given.action == "snapshot":
        servers.append(("QEMU's", qemus))
    with ExitStack() as stack:
        mine = stack.enter_context(tempfile.TemporaryDirectory(dir=given.directory, prefix="pause-"))
        stack.callback(ignore_signals)
        for name, server in servers:
            found = Found()
            try:
                measure(given.snapshots, given.seconds, server, Path(mine), found)
            except (OSError, RuntimeError) as error:
                if server is not qemus:
                    raise
                print(f"{name} ended early: {error}")
            print(told(f"{name}, slowest request in a {given.action}", found.slowest))
            print(told(f"{name}, slowest request right before", found.before))
            print(told(f"{name}, the command", found.commands), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
