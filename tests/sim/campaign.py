"""Histories by seed, and what they add up to."""

import random
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import lcm

from tests.crash.walk import Count
from tests.sim.image import NAMED
from tests.sim.life import Tally, World
from tests.sim.liveness import Longest
from tests.sim.trouble import Trouble, Violation
from tests.sim.walk import visit

TROUBLES = 8  # sorts of them
DIRECT = 0.2  # of histories whose data goes by O_DIRECT
TOLD = 10  # histories, of a walk over many


@dataclass(frozen=True)
class Plan:
    """What is run."""

    first: int
    histories: int
    sorts: Sequence[str]
    twice: bool = False  # and compared
    states: int = 0  # of deaths in last lives, to be visited
    moments: int = 0  # of one last life, at most; 0: all
    until_found: bool = False
    is_full: bool = False  # the host, for a while, whatever a seed says
    is_filled: bool = False  # for good
    is_direct: bool = False

    def world(self, seed: int) -> World:
        """The history of *seed*."""
        draw, more = random.Random(seed), random.Random(f"{seed} more")
        turn = seed + seed // lcm(len(self.sorts), TROUBLES)  # so that each sort meets each trouble
        sort = NAMED[self.sorts[turn % len(self.sorts)]]
        is_long = seed % TROUBLES == 5
        return World(
            seed,
            sort,
            writethrough=draw.random() < 0.4,
            trouble=self._trouble(seed, more),
            lives=draw.choice((1, 2)) if is_long else draw.choice((1, 2, 3, 4)),
            is_long=is_long,
            is_direct=self.is_direct or more.random() < DIRECT,
        )

    def _trouble(self, seed: int, more: random.Random) -> Trouble:
        if self.is_filled:
            return Trouble(filled=True)
        match 7 if self.is_full else seed % TROUBLES:
            case 7:
                return Trouble(full=True)
            case 3:
                return Trouble(failing=0.01, failing_sync=0.05)
            case 4:
                return Trouble(far=True, full=more.random() < 0.3, failing=more.choice((0, 0, 0.01)))
            case 1:
                return Trouble(short=0.25, passing=0.25, cold=0.4)
            case _:
                return Trouble(punches=seed % TROUBLES != 6)


def run(plan: Plan) -> int:
    """Run the histories -> 0, or 1 if one of them broke a promise; that is printed with its seed."""
    total, count, longest = Tally(), Count(), Longest()
    failed = 0
    for seed in range(plan.first, plan.first + plan.histories):
        if plan.until_found:
            print(f"history {seed}", flush=True)  # for whoever counts them, should this process not come to its end
        world = plan.world(seed)
        fault = _run_one(world, total, count if count.states < plan.states else None, plan.moments)
        longest.add(world.longest)
        if plan.twice and not fault:
            again = plan.world(seed)
            if _run_one(again, Tally()) or again.digest != world.digest:
                fault = "a second run of this seed is another history"
        if fault:
            failed += 1
            print(f"seed {seed}: {world.sort.name}, writethrough={world.writethrough}: {fault}", flush=True)
            if plan.until_found:
                break
        if plan.states and total.histories % TOLD == 0:
            print(f"so far: {total}, {count}", flush=True)
    print(total)
    print(longest)
    if plan.states:
        print(count)
    return 1 if failed else 0


def _run_one(world: World, total: Tally, count: Count | None = None, moments: int = 0) -> str:
    """What was wrong."""
    fault = ""
    try:
        world.run()
        if count is not None and world.is_walkable:
            count.add(visit(world, moments))
    except Violation as error:
        fault = str(error)
    except Exception:
        fault = traceback.format_exc()
    for one in fields(Tally):
        setattr(total, one.name, getattr(total, one.name) + getattr(world.tally, one.name))
    return fault
