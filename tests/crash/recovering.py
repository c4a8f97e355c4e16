"""An explorer that lets power fail in a recovery after a kill, too: what was not synced is pending until that syncs."""

import random

from tests.crash.driver import Point
from tests.crash.explorer import Explorer
from tests.crash.walk import RECOVERED, RECOVERIES, recovery


class RecoveringExplorer(Explorer):
    """Visits each recovery of one in RECOVERED kills."""

    def _visit(self, point: Point, draw: random.Random) -> None:
        super()._visit(point, draw)
        if self.at is None and point.position % RECOVERED == 0:
            for how in RECOVERIES:
                self._visit_recovery(point, how)

    def _visit_recovery(self, point: Point, how: str) -> None:
        initial = point.stable.copy()
        initial.memory.store(0, bytes(point.memory.content))
        pending = [effect for _, effect in point.pending]
        where = f"{self.run.name} point={point.position}/{how}"
        run, begun = recovery(where, initial, pending, None, self.run.history)
        again = type(self)(run, self.opener, self.seed, self.samples, at=point.position)
        self.states += again.explore(since=begun + 1)
        self.opened += again.opened
