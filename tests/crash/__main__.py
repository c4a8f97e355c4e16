"""`python -m tests.crash explore` visits crash states by the million, `replay LINE` the one that a line names.

`python -m tests.crash faults` lets every operation of every sequence of actions fail.
"""

import argparse
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import Pool
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.crash.campaign import CACHES, Workload, explore, replay, scene_of, sequences_of
from tests.crash.explorer import Violation
from tests.crash.life import Host
from tests.crash.sequence import OVERLAYS, SORTS, Sort, fullness, sequences
from tests.crash.walk import Count, Scene

BATCH = 40  # workloads of one image that a process takes at a time
FAULTY_BATCH = 20  # sequences on one sort of image that a process lets fail at a time
RANDOMS = ("random-40x8", "burst-40x8")
LONG_RANDOM = "random-120x16"


@dataclass(frozen=True)
class Batch:
    """Workloads that begin with the same image; of all but the first length only what the last action adds is new."""

    workloads: tuple[Workload, ...]
    only_last: bool


@dataclass
class Result:
    """What a batch came to."""

    sort: str
    count: Count = field(default_factory=Count)
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)


def begin_process() -> None:
    """A session of its own, which has its share of the processors; ended by the pool."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def work(batch: Batch) -> Result:
    """Visit the states of *batch*."""
    result = Result(batch.workloads[0].sort.name)
    start = time.process_time()
    with TemporaryDirectory() as directory:
        scene: Scene = scene_of(batch.workloads[0], Path(directory))
        for workload in batch.workloads:
            try:
                explore(workload, scene, only_last=batch.only_last)
            except Violation as violation:
                result.violations.append(str(violation))
    result.count = scene.count
    result.seconds = time.process_time() - start
    return result


def batches(longest: int, seed: int) -> Iterator[Batch]:
    """Single actions, random workloads, then longer and longer sequences, in an order drawn from *seed*."""
    yield from batches_of(1, seed)
    for sort in OVERLAYS.values():
        for cache in CACHES:
            for what in RANDOMS:
                yield Batch((Workload(sort, cache, seed, what),), only_last=False)
    for sort in SORTS.values():
        if sort.cluster_bits < 16:  # with larger clusters a state costs ten times as much
            for cache in CACHES:
                for what in RANDOMS:
                    yield Batch((Workload(sort, cache, seed, what),), only_last=False)
            yield Batch((Workload(sort, "writeback", seed, LONG_RANDOM),), only_last=False)
    for length in range(2, longest + 1):
        sequences = list(batches_of(length, seed))
        random.Random(seed).shuffle(sequences)
        yield from sequences


def batches_of(length: int, seed: int) -> Iterator[Batch]:
    for sort in SORTS.values():
        for cache in CACHES:
            groups: dict[str, list[Workload]] = {}
            for workload in sequences_of(sort, cache, seed, length):
                groups.setdefault(workload.full, []).append(workload)
            for group in groups.values():
                for start in range(0, len(group), BATCH):
                    yield Batch(tuple(group[start : start + BATCH]), only_last=length > 1)


@dataclass(frozen=True)
class FaultyBatch:
    """Sequences whose operations fail, on images that are equally full."""

    sort: Sort
    cache: str
    crowd: int | None  # a seed; None: no neighbours
    sequences: tuple[tuple[str, ...], ...]


@dataclass
class Outcomes:
    """What became of the images of a sort."""

    sort: str
    sequences: int = 0
    lives: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)

    def add(self, other: "Outcomes") -> None:
        """Sum up."""
        self.sequences += other.sequences
        self.lives.update(other.lives)
        self.seconds += other.seconds
        self.violations += other.violations


def fail(batch: FaultyBatch) -> Outcomes:
    """Lead the lives of *batch*."""
    result = Outcomes(batch.sort.name)
    start = time.process_time()
    host = Host(batch.sort, batch.cache, batch.crowd)
    for sequence in batch.sequences:
        try:
            host.live_with_every_fault(sequence)
            result.sequences += 1
        except Violation as violation:
            result.violations.append(str(violation))
    result.lives = host.outcomes
    result.seconds = time.process_time() - start
    return result


def faulty_batches(length: int, seed: int) -> list[FaultyBatch]:
    """Every sequence of *length* actions, alone and in a crowd, in an order drawn from *seed*."""
    batches = [
        FaultyBatch(sort, cache, crowd, tuple(ordered[start : start + FAULTY_BATCH]))
        for sort in SORTS.values()
        for cache in CACHES
        for crowd in (None, seed)
        for ordered in [sorted(sequences(sort, length), key=fullness)]
        for start in range(0, len(ordered), FAULTY_BATCH)
    ]
    random.Random(seed).shuffle(batches)
    return batches


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    exploring = commands.add_parser("explore", help="visit states, and say how many")
    exploring.add_argument("--states", type=int, help="stop after so many; default: when all sequences are done")
    exploring.add_argument("--length", type=int, default=3, help="of the longest sequences")
    failing = commands.add_parser("faults", help="let every operation fail, and say what became of the images")
    failing.add_argument("--faults", type=int, help="stop after so many; default: when all sequences are done")
    failing.add_argument("--length", type=int, default=2, help="of the sequences")
    for command in (exploring, failing):
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    replaying = commands.add_parser("replay", help="visit one state")
    replaying.add_argument("line", help="as a failure printed it")
    arguments = parser.parse_args()
    match arguments.command:
        case "replay":
            return run_replay(arguments.line)
        case "faults":
            return run_faults(arguments)
        case _:
            return run_exploration(arguments)


def run_replay(line: str) -> int:
    try:
        replay(line)
    except Violation as violation:
        print(violation)
        return 1
    print("no violation")
    return 0


def run_faults(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    total, sums = Outcomes("all"), {name: Outcomes(name) for name in SORTS}
    interrupted: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: interrupted.append(number))  # ends early, with the figures
    todo = faulty_batches(arguments.length, arguments.seed)
    with Pool(arguments.jobs, begin_process, maxtasksperchild=10) as pool:
        for done, result in enumerate(pool.imap_unordered(fail, todo), 1):
            for violation in result.violations:
                print(f"VIOLATION {violation}", flush=True)
            sums[result.sort].add(result)
            total.add(result)
            if done % 20 == 0:
                print(f"{done} of {len(todo)} batches, {total.lives.total()} faults", file=sys.stderr, flush=True)
            if interrupted or (arguments.faults is not None and total.lives.total() >= arguments.faults):
                pool.terminate()
                break
    kinds = [kind for kind, _ in total.lives.most_common()]
    print(f"| image | sequences | faults | {' | '.join(kinds)} | CPU seconds |")
    print("|---" * (len(kinds) + 4) + "|")
    for one in [*sums.values(), total]:
        numbers = [one.sequences, one.lives.total(), *(one.lives[kind] for kind in kinds)]
        print(f"| {one.sort} | {' | '.join(map(str, numbers))} | {one.seconds:.0f} |")
    elapsed = time.monotonic() - started
    print(f"\n{done} of {len(todo)} batches of sequences")
    print(f"seed {arguments.seed}, {elapsed:.0f} s with {arguments.jobs} processes, {len(total.violations)} violations")
    return 1 if total.violations else 0


def run_exploration(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    sums: dict[str, Result] = {}
    total, violations = Count(), 0
    interrupted: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: interrupted.append(number))  # ends early, with the figures
    todo = list(batches(arguments.length, arguments.seed))
    with Pool(arguments.jobs, begin_process, maxtasksperchild=50) as pool:
        for done, result in enumerate(pool.imap_unordered(work, todo), 1):
            for violation in result.violations:
                violations += 1
                print(f"VIOLATION {violation}", flush=True)
            mine = sums.setdefault(result.sort, Result(result.sort))
            mine.count.add(result.count)
            mine.seconds += result.seconds
            total.add(result.count)
            if done % 20 == 0:
                print(f"{done} of {len(todo)} batches, {total.states} states", file=sys.stderr, flush=True)
            if interrupted or (arguments.states is not None and total.states >= arguments.states):
                pool.terminate()
                break
    print_figures(sums, total, done, len(todo))
    elapsed = time.monotonic() - started
    print(f"\nseed {arguments.seed}, {elapsed:.0f} s with {arguments.jobs} processes, {violations} violations")
    return 1 if violations else 0


def print_figures(sums: dict[str, Result], total: Count, done: int, todo: int) -> None:
    """A table for the documentation."""
    columns = (
        "workloads",
        "moments",
        "states",
        "disks opened",
        "recoveries",
        "copies",
        "judged by QEMU",
        "CPU seconds",
    )
    print(f"| image | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for name, one in [*sums.items(), ("all", Result("all", total, sum(one.seconds for one in sums.values())))]:
        count = one.count
        numbers = (
            count.workloads,
            count.moments,
            count.states,
            count.opened,
            count.recoveries,
            count.copies,
            count.outside,
        )
        print(f"| {name} | {' | '.join(map(str, numbers))} | {one.seconds:.0f} |")
    print(f"\n{done} of {todo} batches of workloads")


if __name__ == "__main__":
    sys.exit(main())
