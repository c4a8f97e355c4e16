"""``python -m tests.kill``: rounds on every kind of image in every cache mode, until so many daemons were killed.

Daemons that bypass the page cache have a slow disk, so that what they had under way ends after them.
"""

import argparse
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import gettempdir, mkdtemp

from tests.kill.campaign import CACHES, DIRECT, run_round
from tests.kill.features import FEATURES
from tests.kill.images import KINDS
from tests.kill.round import Tally
from tests.kill.throttle import NoThrottle, Throttle, throttle

ROUND = 6  # kills on one image


def main() -> int:
    """Print a line a kind and mode, and the sum; the exit status: 1 if anything was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.kill", description=__doc__)
    parser.add_argument("--kills", type=int, default=240, help="at least so many in all (default: 240)")
    parser.add_argument("--seed", type=int, default=0, help="draws everything (default: 0)")
    parser.add_argument("--kind", choices=[*KINDS, *FEATURES], action="append", help="only images of this kind")
    parser.add_argument("--cache", choices=CACHES, action="append", help="only this cache mode")
    given = parser.parse_args()
    with ExitStack() as stack:
        return _kill(given, _slow_disk(stack, {*(given.cache or CACHES)}))


def _slow_disk(stack: ExitStack, caches: set[str]) -> Throttle | None:
    """What runs a daemon with one, if a mode of *caches* bypasses the page cache and this host can."""
    if not caches & {*DIRECT}:
        return None
    try:
        return stack.enter_context(throttle(Path(gettempdir())))
    except NoThrottle as reason:
        say(str(reason))
        return None


def _kill(given: argparse.Namespace, slow: Throttle | None) -> int:
    pairs = [(kind, cache) for kind in given.kind or (*KINDS, *FEATURES) for cache in given.cache or CACHES]
    began = time.monotonic()
    total = Tally()
    for kind, cache in pairs:
        tally = Tally()
        seed = given.seed
        while tally.kills < -(-given.kills // len(pairs)):
            place = Path(mkdtemp(prefix="kill-"))
            throttled = slow if cache in DIRECT else None
            tally += run_round(place, kind, cache, seed=seed, kills=ROUND, say=say, slow=throttled)
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
        f"{tally.acknowledged} requests acknowledged, {tally.in_flight} in flight, "
        f"{tally.outlived} times beyond the end, {tally.lost} lost, "
        f"{tally.corrupt} corrupt, up to {tally.leaked} clusters leaked"
    )


if __name__ == "__main__":
    sys.exit(main())
