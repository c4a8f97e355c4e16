"""`python -m bench.pause`: how long a guest's requests take while snapshots of its disk are taken, ours and QEMU's.

Or, with `--action`, while something else is done to it that makes requests wait, ours alone. 4 KiB random writes at
depth 32, page cache warm. Of each snapshot the slowest request counts, and beside it the slowest one of as long a time
right before.
"""

import argparse
import json
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.frontend import FrontEnd
from bench.load import Job, Load, memory_nbytes
from bench.server import Aio, Server, Service, connect, listen, our_command, qemu_command
from qcow2 import create
from vhost import Control
from vhost.option import CacheMode

GIB = 1 << 30
JOB = Job(GIB, depth=32)
STEP = 0.01  # seconds, between two looks whether the snapshot is taken
AFTER = 0.05  # seconds that count as well

Take = Callable[[str], None]
ACTIONS: dict[str, Callable[[Control, str], object]] = {
    "snapshot": lambda control, name: control.snapshot(name),
    "snapshot-with-bitmaps": lambda control, name: control.snapshot(name, carry_bitmaps=True),
    "snapshot-internal": lambda control, name: control.internal_snapshots.create(name),
    "bitmap-add": lambda control, name: control.bitmaps.add(name),
}


@dataclass(frozen=True, slots=True)
class Found:
    """Milliseconds, of each snapshot."""

    slowest: list[float]
    before: list[float]
    commands: list[float]


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
    monitor, monitor_path = socket.socket(socket.AF_UNIX), f"{image}.monitor"
    more = [
        *("--chardev", f"socket,id=monitor,path={monitor_path},server=on,wait=off"),
        *("--monitor", "chardev=monitor"),
    ]
    command = [*qemu_command(Service(image, CacheMode.WRITEBACK), listening.fileno(), Aio.IO_URING), *more]
    stack.enter_context(Server(command, listening))
    nodes = ["disk"]

    def ask(execute: str, **arguments: Any) -> None:
        monitor.sendall(json.dumps({"execute": execute, "arguments": arguments}).encode())
        answer = ""
        while '"return"' not in answer and '"error"' not in answer:
            answer = replies.readline()
        if '"error"' in answer:
            raise RuntimeError(answer)

    def take(name: str) -> None:
        if len(nodes) == 1:
            monitor.connect(monitor_path)
            ask("qmp_capabilities")
        arguments = {"node-name": nodes[-1], "snapshot-file": str(image.with_name(name)), "format": "qcow2"}
        ask("blockdev-snapshot-sync", **arguments, **{"snapshot-node-name": name})
        nodes.append(name)

    with monitor, monitor.makefile("r") as replies:
        yield address, take


def measure(snapshots: int, server: Callable[..., Any], directory: Path) -> Found:
    """Take them, a twentieth of a second apart."""
    image = directory / "disk.qcow2"
    create(image, GIB, lazy_refcounts=True)
    found = Found([], [], [])
    with ExitStack() as stack:
        address, take = stack.enter_context(server(image, stack))
        front_end = stack.enter_context(
            FrontEnd(connect(address), queues=1, nbytes=memory_nbytes(JOB), depth=JOB.depth)
        )
        load = stack.enter_context(Load(JOB, front_end))
        load.run(1.0)
        seconds = 0.1
        for number in range(snapshots):
            found.before.append(slowest(load, lambda seconds=seconds: load.run(seconds)))
            began = time.monotonic()
            found.slowest.append(slowest(load, lambda number=number: while_taken(load, take, f"s{number}", found)))
            seconds = time.monotonic() - began
        load.drain()
    return found


def slowest(load: Load, run: Callable[[], Any]) -> float:
    """Milliseconds that the slowest request took."""
    load.reset()
    run()
    return load.outcome().latencies.percentile(100) / 1e6


def while_taken(load: Load, take: Take, name: str, found: Found) -> None:
    def command() -> None:
        began = time.monotonic()
        take(name)
        found.commands.append(1e3 * (time.monotonic() - began))

    taker = threading.Thread(target=command)
    taker.start()
    while taker.is_alive():
        load.run(STEP)
    load.run(AFTER)


def told(what: str, values: list[float]) -> str:
    quantiles = statistics.quantiles(values, n=100, method="inclusive")
    named = {"median": quantiles[49], "p90": quantiles[89], "p99": quantiles[98], "max": max(values)}
    return f"{what}, ms: " + ", ".join(f"{name} {value:.2f}" for name, value in named.items())


def main() -> int:
    """Print the figures of each server."""
    parser = argparse.ArgumentParser(prog="python -m bench.pause", description=__doc__)
    parser.add_argument("--snapshots", type=int, default=100, help="%(default)s")
    parser.add_argument("--directory", type=Path, default=Path(".cache"), help="images go here (%(default)s)")
    parser.add_argument("--action", choices=ACTIONS, default="snapshot", help="%(choices)s (%(default)s)")
    given = parser.parse_args()
    given.directory.mkdir(parents=True, exist_ok=True)
    servers: list[tuple[str, Callable[..., Any]]] = [("ours", partial(ours, action=given.action))]
    for name, server in [*servers, *([("QEMU's", qemus)] if given.action == "snapshot" else [])]:
        with tempfile.TemporaryDirectory(dir=given.directory, prefix="pause-") as directory:
            found = measure(given.snapshots, server, Path(directory).resolve())
        print(told(f"{name}, slowest request in a {given.action}", found.slowest))
        print(told(f"{name}, slowest request right before", found.before))
        print(told(f"{name}, the command", found.commands), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
