"""`python -m tests.sim.live`: what is done to a disk that is served, and every death in between."""

import argparse
import subprocess
import sys
import time
import traceback
from collections import Counter

from tests.sim.build import load
from tests.sim.livemutant import BY_NAME


def main(arguments: list[str]) -> int:
    """Print a line a violation, and what was seen; 1 if there was any."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.live", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the first history")
    parser.add_argument("--histories", type=int, default=10_000, help="at most")
    parser.add_argument("--states", type=int, default=200_000, help="to be visited")
    parser.add_argument("--more", type=int, default=0, help="histories after those, whose deaths are not visited")
    parser.add_argument("--mutant", choices=[*BY_NAME], help="break the code; stop at the first violation")
    parser.add_argument("--mutants", action="store_true", help="the same with each in turn: all must be found")
    options = parser.parse_args(arguments)
    if options.mutants:
        return hunt()
    load([])
    if options.mutant:
        BY_NAME[options.mutant]()
    began, states, opened, failed, histories, more = time.monotonic(), 0, 0, 0, 0, options.more
    done: Counter[str] = Counter()
    for seed in range(options.seed, options.seed + options.histories):
        visits = states < options.states
        more -= not visits
        if more < 0 or (options.mutant and failed):
            break
        histories += 1
        walk, fault = run_one(seed, done, visits=visits)
        states, opened = states + walk[0], opened + walk[1]
        if fault:
            failed += 1
            print(f"seed {seed}: {fault}", flush=True)
    what = ", ".join(f"{name} {count}" for name, count in sorted(done.items()))
    print(
        f"{histories} histories, {what}; {states} states, {opened} of them opened, {failed} violations; "
        f"{time.monotonic() - began:.0f} s"
    )
    return 1 if failed else 0


def hunt() -> int:
    """Let a process with each mutant look for it -> 1 if one was not found."""
    left = 0
    for name in BY_NAME:
        command = [sys.executable, "-m", "tests.sim.live", "--mutant", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
        left += not found
        print(f"{name}: {'found' if found else 'not found'}\n{done.stdout}{done.stderr}", flush=True)
    return 1 if left else 0


def run_one(seed: int, done: Counter[str], *, visits: bool) -> tuple[tuple[int, int], str]:
    """How many states were visited and opened, and what was wrong."""
    from tests.sim.livelife import LiveWorld
    from tests.sim.livewalk import LiveWalk
    from tests.sim.trouble import Violation

    world = LiveWorld(seed)
    walk, fault = None, ""
    try:
        world.run()
        if visits:
            walk = LiveWalk(world)
            walk.visit()
    except Violation as error:
        fault = f"{', '.join(world.ledger.done)}: {error}"
    except Exception:
        fault = traceback.format_exc()
    done.update(world.ledger.done)
    return (walk.states, walk.opened) if walk else (0, 0), fault


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
