"""``python -m tests.kill.live``: daemons killed in the midst of snapshots and jobs, beside a guest's load.

Each round is one chain, which its daemons change while they serve it. What was acknowledged is there after each kill;
each file of the chain is sound at the end, says QEMU, and a backup that is there holds the disk of its moment.
"""

import argparse
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import ClassVar

import qcow2
from qcow2.node.chain import chain_paths
from tests.kill.__main__ import describe, say
from tests.kill.campaign import run_round
from tests.kill.images import KINDS
from tests.kill.ledger import Ledger
from tests.kill.round import Round, Tally
from tests.oracle import assert_not_corrupt
from vhost import Control, ControlError

CACHES = ("writeback", "writethrough", "none")
ROUND = 6  # kills on one chain
RATES = (0, 0, 1 << 20, 8 << 20)  # of jobs, bytes a second


class Operator:
    """Somebody who works on a served disk until its daemon is gone. A context manager.

    `judge` looks at what there is of it then.
    """

    def __init__(self, path: Path, ledger: Ledger, draw: random.Random) -> None:
        self.done: Counter[str] = Counter()
        self._path = path
        self._ledger = ledger
        self._draw = draw
        self._made = 0  # names that were given
        self._copies: dict[Path, Ledger] = {}  # each, if it is there, is what the disk held then
        self._bitmap = ""
        self._backups: list[str] = []  # since the bitmap was new

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Until the daemon is gone."""
        thread = threading.Thread(target=self._work, name="operator")
        thread.start()
        try:
            yield
        finally:
            thread.join()

    def _work(self) -> None:
        with suppress(ControlError), Control(f"{self._path}.control") as control:
            while True:
                try:
                    self._do_one(control)
                except ControlError as error:  # refused, or the daemon is gone
                    if "no daemon" in str(error):
                        return

    def _do_one(self, control: Control) -> None:
        chain = [self._snapshot, self._snapshot, self._stream, self._commit, self._commit]
        act = self._draw.choice([*chain, self._backup, self._backup, self._mirror, self._bitmaps])
        act(control)
        self.done[act.__name__.strip("_")] += 1

    def _name(self, kind: str) -> str:
        self._made += 1
        return f"{kind}{self._made}"

    def _snapshot(self, control: Control) -> None:
        options = {"extended_l2": self._draw.choice(("on", "off"))}
        control.snapshot(self._name("frozen"), carry_bitmaps=self._draw.random() < 0.7, options=options)

    def _stream(self, control: Control) -> None:
        self._await(control, control.stream(rate=self._draw.choice(RATES)).job)

    def _commit(self, control: Control) -> None:
        """What the image holds, or the file under it, into what is under that."""
        is_active, below = self._draw.random() < 0.3, chain_paths(str(self._path), "qcow2")[2:]
        base = None if is_active or not below else below[0]
        self._await(control, control.commit(base, active=is_active, rate=self._draw.choice(RATES)).job)

    def _bitmaps(self, control: Control) -> None:
        """One that goes on, or a new one in its place."""
        self._backups.clear()
        names = [each.name for each in control.bitmaps if not each.busy]
        self._bitmap = self._name("bitmap")
        control.bitmaps.change(
            {"action": "add", "name": self._bitmap}, *({"action": "remove", "name": name} for name in names)
        )

    def _backup(self, control: Control) -> None:
        """By the bitmap over the backup before; or, where that cannot be, of all."""
        name, rate = self._name("backup"), self._draw.choice(RATES)
        there = [each for each in self._backups if self._path.with_name(each).exists()]
        has_bitmap = self._bitmap in [each.name for each in control.bitmaps]
        by = {"bitmap": self._bitmap, "backing": there[-1]} if has_bitmap and there else {}
        with self._ledger.moment() as moment:
            self._copies[self._path.with_name(name)] = moment
            job = control.backup(name, rate=rate, **by).job
        if has_bitmap:
            self._backups.append(name)
        self._await(control, job)

    def _mirror(self, control: Control) -> None:
        """To be served, or left."""
        name, rate, is_left = self._name("copy"), self._draw.choice(RATES), self._draw.random() < 0.4
        is_top = not is_left and self._draw.random() < 0.3  # what is below a copy that is left may be committed to
        job = control.mirror(name, top=is_top, rate=rate).job
        control.set_rate(job, 0)
        if control.wait(job).has_ended:
            return
        if not is_left:
            control.complete(job)
            control.wait(job)
            return
        with self._ledger.moment() as moment:
            control.cancel(job)
            if control.wait(job).state == "cancelled":
                self._copies[self._path.with_name(name)] = moment

    def _await(self, control: Control, job: int) -> None:
        if self._draw.random() < 0.7:
            control.set_rate(job, 0)
            control.wait(job)
        else:
            control.cancel(job)

    def judge(self) -> int:
        """The copies that are there are whole -> how many they were; the daemon is dead. Raises: Lost."""
        found = 0
        for path, moment in self._copies.items():
            if path.exists():
                assert_not_corrupt(path)
                with qcow2.open(path) as disk:
                    moment.judge(disk.read(0, disk.size))
                found += 1
        self._copies.clear()
        return found


class LiveRound(Round):
    """A round whose daemons have somebody who works on the disk."""

    requests = (300, 3000)
    done: ClassVar[Counter[str]] = Counter()  # in all rounds

    def __init__(self, directory: Path, kind: str, cache: str, *, seed: int, kills: int, slow: None = None) -> None:
        super().__init__(directory, kind, cache, seed=seed, kills=kills)
        self._options.append(f"--control={self._start.path}.control")
        self._operator = Operator(self._start.path, self._ledger, random.Random(self._draw.random()))

    @contextmanager
    def _beside(self) -> Iterator[None]:
        with self._operator.at_work():
            yield
        self.done["copies judged"] += self._operator.judge()

    def run(self) -> None:
        super().run()
        for path in chain_paths(str(self._start.path), "qcow2"):
            with qcow2.open(path, "r+"):
                pass  # one that a commit was killed in says that it is to be repaired
            assert_not_corrupt(Path(path))
        self.done.update(self._operator.done)


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
    say(", ".join(f"{what} {count}" for what, count in sorted(LiveRound.done.items())))
    return 1 if total.lost or total.corrupt else 0


if __name__ == "__main__":
    sys.exit(main())
