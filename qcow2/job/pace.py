"""What whoever started a job sees of it and does to it: how far it is, how fast it may go, that it shall end."""

import time
from collections.abc import Callable
from functools import partial

from qcow2.driver.operation import Compute

Progress = Callable[[int, int], None]  # (done, total), in bytes; done never falls
MAX_NAP = 0.1  # seconds until one that is told to end does


class Cancelled(Exception):
    """The job was told to end before it was done."""


def while_going(require_going: Callable[[], None], progress: Progress | None) -> Progress:
    """What tells *progress*, if there is one, unless *require_going()* raises."""

    def tell(done: int, total: int) -> None:
        require_going()
        if progress is not None:
            progress(done, total)

    return tell


class Pace:
    """Shared by a job and whoever started it; both on the job's thread, but for `cancel`."""

    def __init__(self, progress: Progress | None = None, rate: int = 0) -> None:
        """Raises: ValueError for a *rate* below 0."""
        if rate < 0:
            raise ValueError(f"rate {rate} is not a number of bytes a second, or 0 for as fast as it goes")
        self._progress = progress
        self._rate = rate  # bytes a second; 0: as fast as it goes
        self._started = time.monotonic()
        self._passed = 0
        self._is_cancelled = False
        self.total = 0
        self.done = 0

    def begin(self, total: int) -> None:
        """The job will look at *total* bytes."""
        self.total = total
        self._tell()

    def tell(self, done: int, total: int) -> None:
        """So far it is, of steps that nobody can weigh."""
        self.done, self.total = done, total
        self._tell()

    def cancel(self) -> None:
        """Let the job end at its next piece; from any thread."""
        self._is_cancelled = True

    @property
    def is_cancelled(self) -> bool:
        """Whether the job was told to end."""
        return self._is_cancelled

    @property
    def is_limited(self) -> bool:
        """Whether only so many bytes a second may pass."""
        return bool(self._rate)

    def require_going(self) -> None:
        """Raises: Cancelled."""
        if self._is_cancelled:
            raise Cancelled

    def advance(self, nbytes: int) -> None:
        """So many bytes more are done."""
        self.done += nbytes
        self._tell()

    async def wait(self, nbytes: int) -> None:
        """Return when *nbytes* more may be moved.

        Raises: Cancelled.
        """
        self.require_going()
        if not self._rate:
            return
        due = self._started + self._passed / self._rate
        self._passed += nbytes
        while (left := due - time.monotonic()) > 0:
            await Compute(partial(time.sleep, min(left, MAX_NAP)))
            self.require_going()

    async def give_way(self) -> None:
        """At each step that may need nothing of the disk: let others have a turn, if they share the thread."""

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self.done, self.total)
