"""``python -m tests.chains``: random chains, each piece of work on as many, and a sample of the deaths within it."""

import argparse
import os
import sys
import time
from multiprocessing import Pool

from tests.chains.trial import Trial
from tests.chains.work import WORK

WITH_QEMU = 10  # every so many chains its view is asked for


def main() -> int:
    """Print a line a piece of work; the exit status: 1 if a guest saw another disk."""
    parser = argparse.ArgumentParser(prog="python -m tests.chains", description=__doc__)
    parser.add_argument("--chains", type=int, default=1000, help="for each piece of work (default: 1000)")
    parser.add_argument("--states", type=int, default=100_000, help="deaths, in all, about (default: 100000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first chain (default: 0)")
    parser.add_argument("--work", choices=WORK, action="append", help="only this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a processor)")
    given = parser.parse_args()
    began, total, wrong = time.monotonic(), 0, 0
    kinds = given.work or list(WORK)
    per_chain = -(-given.states // (given.chains * len(kinds)))
    with Pool(given.jobs) as pool:
        for kind in kinds:
            seeds = range(given.seed, given.seed + given.chains)
            trials = [Trial(kind, seed, per_chain, with_qemu=seed % WITH_QEMU == 0) for seed in seeds]
            found = pool.map(run, trials, chunksize=10)
            states = sum(each for each in found if isinstance(each, int))
            failures = [each for each in found if isinstance(each, str)]
            print(f"{kind:8} {len(trials)} chains, {states} states, {len(failures)} violations", flush=True)
            print("".join(f"  {each}\n" for each in failures), end="", flush=True)
            total, wrong = total + states, wrong + len(failures)
    print(
        f"all      {given.chains * len(kinds)} chains, {total} states, {wrong} violations; seed {given.seed}, "
        f"{time.monotonic() - began:.0f} s"
    )
    return 1 if wrong else 0


def run(trial: Trial) -> int | str:
    """How many states were looked at, or what was wrong."""
    try:
        return trial.run()
    except AssertionError as violation:
        return str(violation)


if __name__ == "__main__":
    sys.exit(main())
