"""The pace of a job that goes on beside something else: it may be held, slowed down or told to make room meanwhile."""

import time

from qcow2.driver.operation import Signal, give_way
from qcow2.job.pace import Pace

STEPS = 16  # that need nothing of the disk, until others have a turn: each takes some 30 us


class Reins(Pace):
    """A pace that puts nobody to sleep: a job that waits is woken by `wake`, and looks again whether it may go on.

    `wake` and the job are the scheduler's; whatever changes is set by one store, from any thread.
    """

    def __init__(self, rate: int = 0, *, is_held: bool = False) -> None:
        """*rate*: bytes a second; 0: as fast as it goes."""
        super().__init__()
        self.rate = rate
        self.is_held = is_held
        self._due = 0.0  # when more may be moved
        self._turn = Signal()
        self._steps = 0

    def set_rate(self, rate: int) -> None:
        """From now on; what was moved at another one is forgotten."""
        self.rate = rate
        self._due = 0.0

    async def wait(self, nbytes: int) -> None:
        """Return when *nbytes* more may be moved.

        Raises: Cancelled.
        """
        self.require_going()
        while self.is_held or (self.rate and self._due > time.monotonic()):
            await self._turn.wait()
            self.require_going()
        if self.rate:
            self._due = max(self._due, time.monotonic()) + nbytes / self.rate

    async def give_way(self) -> None:
        """At each step that may need nothing of the disk: now and then let the guest's requests come first."""
        self._steps += 1
        if self._steps % STEPS == 0:
            await give_way()

    async def wake(self) -> None:
        """Let a job that waits look again."""
        turn, self._turn = self._turn, Signal()
        turn.set()
