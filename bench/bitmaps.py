"""`python -m bench.bitmaps`: what dirty bitmaps cost a guest that overwrites 4 KiB at random, warm, at depth 32.

One load on one image, whose bitmaps are disabled and enabled in turns while it goes on: nothing else differs, neither
the file's place nor the daemon. Ratios are of neighbours, enabled over disabled; their median counts.
"""

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from bench.ending import end_on_sigterm, ignore_signals
from bench.frontend import FrontEnd
from bench.load import Job, Load, memory_nbytes
from bench.machine import describe
from bench.nbd import make_image
from bench.ratio import Ratio
from bench.server import Server, Service, connect, listen, our_command
from vhost import Control
from vhost.option import CacheMode

MIB = 1 << 20
WARM = 0.1  # seconds, after each switch


def measure(image: Path, job: Job, passes: int, seconds: float, nbitmaps: int) -> tuple[list[float], list[float]]:
    """Requests a second of each pass, with the bitmaps enabled and disabled."""
    names = [f"b{number}" for number in range(nbitmaps)]
    rates: tuple[list[float], list[float]] = ([], [])
    with ExitStack() as stack:
        listening, address = listen()
        path = image.with_name("control")  # short: an address takes 107 bytes
        service = Service(image, CacheMode.WRITEBACK, options=(f"--control={path}",))
        stack.enter_context(Server(our_command(service, listening.fileno()), listening))
        front_end = stack.enter_context(
            FrontEnd(connect(address), queues=1, nbytes=memory_nbytes(job), depth=job.depth)
        )
        control = stack.enter_context(Control(path))
        for name in names:
            control.bitmaps.add(name)
        load = stack.enter_context(Load(job, front_end))
        for turn in range(2 * passes):
            is_disabled = turn % 4 in (1, 2)  # each comes first in half of the passes
            for name in names:
                (control.bitmaps.disable if is_disabled else control.bitmaps.enable)(name)
            load.run(WARM)
            load.reset()
            load.run(seconds)
            rates[is_disabled].append(load.outcome().iops)
        load.drain()
    return rates


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.bitmaps", description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="of the disk (%(default)s)")
    parser.add_argument("--passes", type=int, default=40, help="%(default)s")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each half of a pass (%(default)s)")
    parser.add_argument("--bitmaps", type=int, default=3, help="%(default)s")
    parser.add_argument("--directory", type=Path, default=Path(".cache"), help="the image goes here (%(default)s)")
    given = parser.parse_args()
    end_on_sigterm()
    given.directory.mkdir(parents=True, exist_ok=True)
    print(describe(given.directory))
    with ExitStack() as stack:
        mine = stack.enter_context(tempfile.TemporaryDirectory(dir=given.directory, prefix="bitmaps-"))
        stack.callback(ignore_signals)
        image = Path(mine).resolve() / "disk.qcow2"
        make_image(image, given.mib * MIB)
        job = Job(given.mib * MIB, depth=32)
        enabled, disabled = measure(image, job, given.passes, given.seconds, given.bitmaps)
    for name, rates in (("enabled", enabled), ("disabled", disabled)):
        ordered = sorted(rates)
        print(f"{name}: {ordered[len(ordered) // 2]:,.0f} IOPS ({ordered[0]:,.0f}-{ordered[-1]:,.0f})")
    print(f"enabled over disabled: {Ratio.of_pairs(enabled, disabled)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
