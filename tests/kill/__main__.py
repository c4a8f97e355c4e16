"""``python -m tests.kill``: rounds on every kind of image in every cache mode, until so many daemons were killed."""

import argparse
import sys
import time
from pathlib import Path
from tempfile import mkdtemp

from tests.kill.campaign import CACHES, run_round
from tests.kill.images import KINDS
from tests.kill.round import Tally

ROUND = 6  # kills on one image


def main() -> int:
    """Print a line a kind and mode, and the sum; the exit status: 1 if anything was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.kill", description=__doc__)
    parser.add_argument("--kills", type=int, default=240, help="at least so many in all (default: 240)")
    parser.add_argument("--seed", type=int, default=0, help="draws everything (default: 0)")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only images of this kind")
    parser.add_argument("--cache", choices=CACHES, action="append", help="only this cache mode")
    given = parser.parse_args()
    pairs = [(kind, cache) for kind in given.kind or KINDS for cache in given.cache or CACHES]
    began = time.monotonic()
    total = Tally()
    for kind, cache in pairs:
        tally = Tally()
        seed = given.seed
        while tally.kills < -(-given.kills // len(pairs)):
            tally += run_round(Path(mkdtemp(prefix="kill-")), kind, cache, seed=seed, kills=ROUND, say=say)
            seed += 1
        say(f"{kind:15} {cache:12} {describe(tally)}")
        total += tally
    say(f"{'all':28} {describe(total)}; seed {given.seed}, {time.monotonic() - began:.0f} s")
    return 1 if total.lost or total.corrupt else 0


def say(text: str) -> None:
    print(text, flush=True)


def describe(tally: Tally) -> str:
    """The tally in one line."""
    return (
        f"{tally.kills} kills ({tally.at_start} while opening, {tally.at_stop} while closing), "
        f"{tally.acknowledged} requests acknowledged, {tally.in_flight} in flight, {tally.lost} lost, "
        f"{tally.corrupt} corrupt, up to {tally.leaked} clusters leaked"
    )


if __name__ == "__main__":
    sys.exit(main())
