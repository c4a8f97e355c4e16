"""`python -m tests.features` leads random lives of images of each feature, and says what was done."""

import argparse
import os
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from tempfile import mkdtemp

from tests.features.life import Life
from tests.features.qemu import Qemu
from tests.features.shape import FEATURES, draw_shape

TURNS = 5  # of a life


def main() -> int:
    """The exit status: 1 if a life went wrong; its directory stays then."""
    parser = argparse.ArgumentParser(prog="python -m tests.features", description=__doc__)
    parser.add_argument("features", nargs="*", choices=[*FEATURES, []], help="default: all")
    parser.add_argument("--operations", type=int, default=5000, help="for each feature")
    parser.add_argument("--every", type=int, default=100, help="operations between two judgements")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    qemus = [Qemu(), *([Qemu(other)] if (other := os.environ.get("QEMU_BIN")) else [])]
    print(f"judges: {', '.join(qemu.name for qemu in qemus)}", flush=True)
    failures = 0
    for feature in given.features or FEATURES:
        done: Counter[str] = Counter()
        began, lives, wrong, seed = time.monotonic(), 0, 0, given.seed
        while done.total() < given.operations:
            lives += 1
            wrong += not lead(feature, seed, qemus, given.every, done)
            seed += 1
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(done.items()))
        print(f"{feature}: {done.total()} operations, {lives} lives, {wrong} failed, ", end="")
        print(f"{time.monotonic() - began:.0f} s ({kinds})", flush=True)
        failures += wrong
    return 1 if failures else 0


def lead(feature: str, seed: int, qemus: list[Qemu], every: int, done: Counter[str]) -> bool:
    """One life; whether all went well."""
    draw = Random(f"{feature} {seed}")
    life = Life(Path(mkdtemp(prefix="features-")), draw_shape(draw, feature), draw, qemus)
    try:
        life.lead(TURNS, every)
    except Exception:
        traceback.print_exc()
        print(
            f"FAILED {feature} --seed {seed}: {life.shape}, in the turn of {getattr(life, 'who', 'nobody')}, ", end=""
        )
        print(f"see {life.directory}", flush=True)
        return False
    finally:
        done.update(life.done)
    for path in life.directory.iterdir():
        path.unlink()
    life.directory.rmdir()
    return True


if __name__ == "__main__":
    sys.exit(main())
