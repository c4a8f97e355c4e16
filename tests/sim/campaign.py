"""Histories by seed, and what they add up to."""

import random
import traceback
from collections.abc import Sequence
from dataclasses import fields

from tests.sim.life import NAMED, Tally, Trouble, Violation, World


def world_of(seed: int, sorts: Sequence[str]) -> World:
    """The history of *seed*."""
    draw = random.Random(seed)
    sort = NAMED[sorts[seed % len(sorts)]]
    is_long = seed % 8 == 5
    return World(
        seed,
        sort,
        writethrough=draw.random() < 0.4,
        trouble=Trouble(failing=0.01, failing_sync=0.05) if seed % 4 == 3 else Trouble(),
        lives=draw.choice((1, 2)) if is_long else draw.choice((1, 2, 3, 4)),
        is_long=is_long,
    )


def run(
    first: int, histories: int, sorts: Sequence[str] | None, *, twice: bool = False, until_found: bool = False
) -> int:
    """Run them -> 0, or 1 if one of them broke a promise, which is printed with its seed; *twice*: and differed."""
    total = Tally()
    failed = 0
    for seed in range(first, first + histories):
        fault, digest = _run_one(seed, sorts or [*NAMED], total)
        if twice and (fault, digest) != _run_one(seed, sorts or [*NAMED], Tally()):
            fault = fault or "a second run of this seed is another history"
        if fault:
            failed += 1
            print(f"seed {seed}: {fault}")
            if until_found:
                break
    print(total)
    return 1 if failed else 0


def _run_one(seed: int, sorts: Sequence[str], total: Tally) -> tuple[str, str]:
    """What was wrong, and what tells the history from others."""
    world = world_of(seed, sorts)
    fault = ""
    try:
        world.run()
    except Violation as error:
        fault = f"{world.sort.name}, writethrough={world.writethrough}: {error}"
    except Exception:
        fault = f"{world.sort.name}: {traceback.format_exc()}"
    for one in fields(Tally):
        setattr(total, one.name, getattr(total, one.name) + getattr(world.tally, one.name))
    return fault, world.digest
