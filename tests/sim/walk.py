"""Every death in the last life of a history, as the crash explorer visits it."""

import random

from tests.crash.explorer import Violation as CrashViolation
from tests.crash.walk import Count, Scene, Walk
from tests.sim.life import World
from tests.sim.trouble import Lost, Violation


class LifeWalk(Walk):
    """Knows what a kill earlier in the history has lost."""

    def _take(self, entry: object) -> bool:
        if not isinstance(entry, Lost):
            return super()._take(entry)
        self._in_flight.discard(entry.number)
        if entry.number in self._pending:
            del self._pending[entry.number]
            del self._parts[entry.number]
            self._enumerate()
        return False


IN_A_ROW = 16  # moments: what neighbours leave is mostly the same, and opened once


def visit(world: World, most: int) -> Count:
    """Judge what each death in the last life leaves; at *most* so many moments, drawn by the seed; 0: at all.

    Raises: Violation; its message names the state.
    """
    scene, run = Scene(world.backing), world.as_run()
    moments = range(world.first + 1, len(run.journal) + 1)
    drawn = None
    if 0 < most < len(moments):
        starts = random.Random(world.seed).sample(moments, most // IN_A_ROW)
        drawn = frozenset(start + step for start in starts for step in range(IN_A_ROW))
    try:
        LifeWalk(run, scene, world.seed).visit(world.first, drawn)
    except CrashViolation as error:
        raise Violation(str(error)) from error
    return scene.count
