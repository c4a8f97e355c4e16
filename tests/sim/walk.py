"""Every death in the last life of a history, as the crash explorer visits it."""

from tests.crash.explorer import Violation as CrashViolation
from tests.crash.walk import Count, Scene, Walk
from tests.sim.kernel import Lost, Violation
from tests.sim.life import World


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


def visit(world: World) -> Count:
    """Judge what each death in the last life leaves. Raises: Violation; its message names the state."""
    scene = Scene(world.backing)
    try:
        LifeWalk(world.as_run(), scene, world.seed).visit(world.first)
    except CrashViolation as error:
        raise Violation(str(error)) from error
    return scene.count
