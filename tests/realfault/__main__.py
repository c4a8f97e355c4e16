"""``python -m tests.realfault``: a daemon's life for every call on its image that may fail, in every setting."""

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import mkdtemp

from tests.kill.images import KINDS
from tests.realfault.campaign import calls_of, faults, settings
from tests.realfault.trial import PHASES, Broken, Setting, live


def main() -> int:
    """Print a line a setting, each life in which something broke, and the sum; the exit status: 1 if any did."""
    parser = argparse.ArgumentParser(prog="python -m tests.realfault", description=__doc__)
    parser.add_argument("--stride", type=int, default=10, help="only every so many-th call while at work (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="draws everything (default: 0)")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only images of this kind")
    parser.add_argument("--phase", choices=PHASES, action="append", help="only faults in this phase")
    parser.add_argument("--option", action="append", default=[], help="only daemons with this option")
    given = parser.parse_args()
    directory = Path(mkdtemp(prefix="realfault-"))
    began = time.monotonic()
    total: Counter[str] = Counter()
    for setting in settings(directory, given.seed):
        is_kind = setting.kind in (given.kind or KINDS) and setting.phase in (given.phase or PHASES)
        if is_kind and set(given.option) <= set(setting.options):
            total += _every_fault(setting, directory, given.stride)
    print(f"{total.total()} lives: {dict(total.most_common())}; {time.monotonic() - began:.0f} s")
    return 1 if total["broken"] else 0


def _every_fault(setting: Setting, directory: Path, stride: int) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    calls = calls_of(setting, directory)
    step = stride if setting.phase == "work" else 1
    for at in range(random.Random(str(setting)).randint(1, step), len(calls) + 1, step):
        for fault in faults(calls, at):
            try:
                outcome, host = live(setting, fault, directory)
                outcomes[outcome if host.hit else "the host did not fail"] += 1
            except Broken as broken:
                outcomes["broken"] += 1
                print(broken, flush=True)
    print(f"{setting}: {len(calls)} calls, {dict(outcomes)}", flush=True)
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
