"""Work beside the requests, by one task at a time, begun when there is some."""

from collections.abc import Callable, Coroutine
from typing import Any

from qcow2.driver.operation import Signal, Spawn
from qcow2.engine.stability import Stability
from qcow2.error import no_memory


class Background:
    """The one task that does *work*, as long as there is any.

    Nothing says that it is under way before it is: what fails on the way there leaves nobody waiting for it.
    """

    def __init__(self, work: Callable[[], Coroutine[Any, Any, None]], stability: Stability) -> None:
        self._work = work
        self._stability = stability
        self._ended: Signal | None = None  # of the one under way

    async def begin(self) -> None:
        """See to it that the task is under way, which was stepped once on return. Returns at once."""
        if self._ended is None:
            await Spawn(self._run())

    async def wait(self) -> None:
        """Wait until none is under way."""
        while self._ended is not None:
            await self._ended.wait()

    async def _run(self) -> None:
        if self._ended is not None:  # two have asked
            return
        self._ended = ended = Signal()
        try:
            await self._work()
        except MemoryError:  # in the middle: nobody knows how far it came
            self._stability.fail(no_memory())
        finally:
            self._ended = None
            ended.set()
