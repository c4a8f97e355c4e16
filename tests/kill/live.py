"""``python -m tests.kill.live``: daemons killed in the midst of snapshots, streams and commits, beside a guest's load.

Each round is one chain, which its daemons change while they serve it. What was acknowledged is there after each kill;
each file of the chain is sound at the end, says QEMU.
"""

import argparse
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp

from qcow2.node.chain import chain_paths
from tests.kill.__main__ import describe, say
from tests.kill.campaign import run_round
from tests.kill.images import KINDS
from tests.kill.round import Round, Tally
from tests.oracle import assert_not_corrupt
from vhost import Control, ControlError

CACHES = ("writeback", "writethrough", "none")
ROUND = 6  # kills on one chain
RATES = (0, 0, 1 << 20, 8 << 20)  # of jobs, bytes a second


class Operator:
    """Somebody who works on a served disk until its daemon is gone. A context manager."""

    def __init__(self, path: Path, draw: random.Random, first: int) -> None:
        self.made = first  # snapshots that were asked for
        self._path = path
        self._draw = draw
        self._thread = threading.Thread(target=self._work, name="operator")

    def __enter__(self) -> "Operator":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._thread.join()

    def _work(self) -> None:
        with suppress(ControlError), Control(f"{self._path}.control") as control:
            while True:
                try:
                    self._do_one(control)
                except ControlError as error:  # refused, or the daemon is gone
                    if "no daemon" in str(error):
                        return

    def _do_one(self, control: Control) -> None:
        match self._draw.choice(("snapshot", "snapshot", "stream", "commit", "commit")):
            case "snapshot":
                self.made += 1
                control.snapshot(f"frozen{self.made}")
            case "stream":
                self._await(control, control.stream(rate=self._draw.choice(RATES)).job)
            case _:
                self._await(control, control.commit(rate=self._draw.choice(RATES)).job)

    def _await(self, control: Control, job: int) -> None:
        if self._draw.random() < 0.7:
            control.set_rate(job, 0)
            control.wait(job)
        else:
            control.cancel(job)


class LiveRound(Round):
    """A round whose daemons have somebody who works on the disk."""

    def __init__(self, directory: Path, kind: str, cache: str, *, seed: int, kills: int, slow: None = None) -> None:
        super().__init__(directory, kind, cache, seed=seed, kills=kills)
        self._options.append(f"--control={self._start.path}.control")
        self._made = 0

    @contextmanager
    def _beside(self) -> Iterator[None]:
        with Operator(self._start.path, random.Random(self._draw.random()), self._made) as operator:
            yield
        self._made = operator.made

    def run(self) -> None:
        super().run()
        for path in chain_paths(str(self._start.path), "qcow2"):
            assert_not_corrupt(Path(path))


def main() -> int:
    """Print a line a kind, and the sum; the exit status: 1 if anything was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.kill.live", description=__doc__)
    parser.add_argument("--kills", type=int, default=500, help="at least so many (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="draws everything (default: 0)")
    given = parser.parse_args()
    began, total, seed = time.monotonic(), Tally(), given.seed
    while total.kills < given.kills:
        kind, cache = KINDS[seed % len(KINDS)], CACHES[seed // len(KINDS) % len(CACHES)]
        place = Path(mkdtemp(prefix="live-"))
        tally = run_round(place, kind, cache, seed=seed, kills=ROUND, say=say, make=LiveRound)
        say(f"{seed:4} {kind:15} {cache:12} {describe(tally)}")
        total += tally
        seed += 1
    say(f"{'all':33} {describe(total)}; {time.monotonic() - began:.0f} s")
    return 1 if total.lost or total.corrupt else 0


if __name__ == "__main__":
    sys.exit(main())
