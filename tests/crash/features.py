"""`python -m tests.crash.features FEATURE... --states N` explores what deaths leave of images with a feature.

Random workloads, seed after seed, on every kind of image that has it; N states of each at least.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator

from tests.crash import bitmaps, luks
from tests.crash.explorer import Violation
from tests.crash.images import BITMAPS, KINDS
from tests.crash.judge import opener, perform
from tests.crash.recovering import RecoveringExplorer
from tests.crash.workload import random_steps
from tests.file import test_compressed_writes, test_crash_data_file, test_crash_snapshots

Case = tuple[str, Callable[[], int]]  # its name, and what explores it and says how many states there were


def of_kinds(names: list[str], seed: int) -> Iterator[Case]:
    """Workloads in Python alone, and with what the data plane does at once."""
    for name in names:
        for writethrough in (False, True):
            for at_once in (False, True):
                yield (
                    f"{name} seed={seed} writethrough={writethrough} at_once={at_once}",
                    lambda name=name, writethrough=writethrough, at_once=at_once: explore(
                        name, seed, writethrough=writethrough, at_once=at_once
                    ),
                )


def explore(name: str, seed: int, *, writethrough: bool, at_once: bool) -> int:
    kind = KINDS[name]
    steps = random_steps(seed, kind.nsectors, kind.cluster_sectors)
    run = perform(name, steps, seed=seed, writethrough=writethrough, at_once=at_once)
    return RecoveringExplorer(run, opener(name), seed).explore(stride=1 if kind.cluster_bits < 14 else 3)


def explore_data_file(seed: int, sort: test_crash_data_file.Sort) -> int:
    count, wrong = test_crash_data_file.violations(seed, sort)
    if wrong:
        raise Violation("; ".join(wrong[:5]))
    return count


def cases(feature: str, seed: int) -> Iterator[Case]:
    """All of one seed."""
    match feature:
        case "subclusters":
            yield from of_kinds([name for name in KINDS if "parts" in name], seed)
        case "encrypted":
            yield from of_kinds([name for name in KINDS if "encrypted" in name], seed)
        case "luks":
            for writethrough in (False, True):
                yield (
                    f"seed={seed} writethrough={writethrough}",
                    lambda writethrough=writethrough: luks.explore(seed, writethrough=writethrough),
                )
        case "data-file":
            for sort in test_crash_data_file.SORTS_APART:
                yield f"{sort}, seed={seed}", lambda sort=sort: explore_data_file(seed, sort)
        case "snapshots":
            for kind in ("small", "small-lazy", "width-64", "v2", "compressed-lazy", "snapshot-lazy"):
                for story in test_crash_snapshots.STORIES:
                    yield (
                        f"{kind} {story} seed={seed}",
                        lambda kind=kind, story=story: test_crash_snapshots.explore(kind, story, seed=seed, stride=3),
                    )
        case "bitmaps":
            for kind in BITMAPS:
                for writethrough in (False, True):
                    yield (
                        f"{kind} seed={seed} writethrough={writethrough}",
                        lambda kind=kind, writethrough=writethrough: bitmaps.explore(
                            kind, seed, writethrough=writethrough
                        ),
                    )
        case "compressed":
            for kind in ("small", "small-lazy", "small-backing", "snapshot", "compressed", "width-1"):
                yield f"{kind} seed={seed}", lambda kind=kind: test_compressed_writes.explore(kind, seed)


FEATURES = ("subclusters", "encrypted", "luks", "data-file", "snapshots", "bitmaps", "compressed")


def main() -> int:
    """The exit status: 1 if there is a violation."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash.features", description=__doc__)
    parser.add_argument("features", nargs="*", choices=[*FEATURES, []], help="default: all")
    parser.add_argument("--states", type=int, default=100_000, help="of each")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    given = parser.parse_args()
    violations = 0
    for feature in given.features or FEATURES:
        began, states, seed, wrong = time.monotonic(), 0, given.seed, 0
        while states < given.states:
            for name, visit in cases(feature, seed):
                try:
                    states += visit()
                except Violation as violation:
                    wrong += 1
                    print(f"VIOLATION {feature} {name}: {violation}", flush=True)
            print(f"{feature}: {states} states up to seed {seed}", file=sys.stderr, flush=True)
            seed += 1
        print(f"{feature}: {states} states, {wrong} violations, {time.monotonic() - began:.0f} s", flush=True)
        violations += wrong
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
