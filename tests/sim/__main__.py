"""`python -m tests.sim`: the daemon's data plane and engine on a simulated kernel, history after history."""

import argparse
import sys
import time

from tests.sim.build import load


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--histories", type=int, default=100)
    parser.add_argument("--sort", action="append", help="of image; all in turns without it")
    parser.add_argument("--twice", action="store_true", help="compare two runs of each seed")
    options = parser.parse_args(arguments)
    load()
    from tests.sim.campaign import run

    began = time.monotonic()
    status = run(options.seed, options.histories, options.sort, twice=options.twice)
    print(f"{time.monotonic() - began:.1f} s")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
