"""`python -m tests.sim`: the daemon's data plane and engine on a simulated kernel, history after history."""

import argparse
import sys
import time

from tests.sim.build import Edit, load
from tests.sim.mutant import BY_NAME

MANY = 10_000_000  # states
MOMENTS = 32  # so that no long life takes all of the states
FEW = Edit("ring/worker.h", "#define WORKER_OPERATIONS 2048", "#define WORKER_OPERATIONS 70")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--histories", type=int, default=100)
    parser.add_argument("--sort", action="append", help="of image; all in turns without it")
    parser.add_argument("--states", type=int, default=0, help="of deaths in last lives, to be visited")
    parser.add_argument(
        "--moments", type=int, default=MOMENTS, help="of one last life at which it may die; 0: all, which may be many"
    )
    parser.add_argument("--twice", action="store_true", help="compare two runs of each seed")
    parser.add_argument("--direct", action="store_true", help="data goes by O_DIRECT")
    parser.add_argument("--filled", action="store_true", help="the host has no space left from some moment on")
    parser.add_argument("--few", action="store_true", help="operations, so that often none is free")
    parser.add_argument("--mutant", choices=[*BY_NAME], help="break the C; stop at the first violation")
    options = parser.parse_args(arguments)
    mutant = BY_NAME.get(options.mutant)
    load([*([mutant.edit] if mutant and mutant.edit else []), *([FEW] if options.few else [])])
    from tests.sim.campaign import Plan, run
    from tests.sim.image import DRAWN
    from tests.sim.patch import apply

    if mutant and not mutant.edit:
        apply(mutant.name)
    began = time.monotonic()
    status = run(
        Plan(
            options.seed,
            options.histories,
            options.sort or (mutant and mutant.sorts) or [*DRAWN],
            twice=options.twice,
            states=MANY if mutant and mutant.walks else options.states,
            moments=0 if mutant else options.moments,
            until_found=mutant is not None,
            is_full=mutant is not None and mutant.is_full,
            is_filled=options.filled or (mutant is not None and mutant.is_filled),
            is_direct=options.direct or (mutant is not None and mutant.is_direct),
        )
    )
    print(f"{time.monotonic() - began:.1f} s")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
