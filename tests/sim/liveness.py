"""Liveness: once the world is kind every request ends soon, no queue waits long behind another, and a stop ends."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from tests.sim.kernel import MS, Kernel
from tests.sim.trouble import Violation

AFTERMATH = 150 * MS  # after the last trouble; what was slow, or waited for that, has ended
SOON = 50 * MS  # in a kind world, where an operation takes 0.4 of them
SOON_IF_FILLED = 200 * MS  # on a host that stays full each write asks for space in vain, one after the other
OVERTAKEN = 200  # by requests of its kind, of other queues, that came later
STOP = 150 * MS


class Waiting(Protocol):
    """A request in flight."""

    number: int
    kind: str
    posted_at: int
    overtaken: int


@dataclass
class Longest:
    """What was seen, beside the bounds."""

    aftermath_ns: int = 0
    answer_ns: int = 0
    overtaken: int = 0
    stop_ns: int = 0

    def add(self, other: "Longest") -> None:
        """The longer of both."""
        self.aftermath_ns = max(self.aftermath_ns, other.aftermath_ns)
        self.answer_ns = max(self.answer_ns, other.answer_ns)
        self.overtaken = max(self.overtaken, other.overtaken)
        self.stop_ns = max(self.stop_ns, other.stop_ns)


class Liveness:
    """Judges one life, from the moment when its troubles end."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._calm_since = 0
        self._kind_since = 0
        self._left: dict[int, Waiting] = {}  # of the troubles
        self.is_calm = self.is_kind = False
        self.longest = Longest()

    def trouble(self) -> None:
        """A life begins."""
        self.is_calm = self.is_kind = False

    def calm(self, waiting: Iterable[Waiting]) -> None:
        """The troubles end; who is *waiting* has to be answered in the AFTERMATH."""
        self.is_calm = True
        self._calm_since = self._kernel.now
        self._left = {one.number: one for one in waiting}
        self._kernel.calm()

    def be_kind(self) -> None:
        """The AFTERMATH is over. Raises: Violation."""
        self.is_kind = True
        self._kind_since = self._kernel.now
        for one in self._left.values():
            raise Violation(f"request {one.number} ({one.kind}) waits {AFTERMATH} ns after the last trouble")

    def answered(self, one: Waiting, others: Iterable[Waiting]) -> None:
        """*one* has ended; *others* are in flight on the other queues. Raises: Violation."""
        if not self.is_kind:
            if self._left.pop(one.number, None):
                self.longest.aftermath_ns = max(self.longest.aftermath_ns, self._kernel.now - self._calm_since)
            return
        took = self._kernel.now - one.posted_at
        self.longest.answer_ns = max(self.longest.answer_ns, took)
        if took > (SOON_IF_FILLED if self._kernel.trouble.filled else SOON):
            raise Violation(f"request {one.number} ({one.kind}) took {took} ns in a kind world")
        for other in others:
            if other.kind == one.kind and other.posted_at < one.posted_at:
                other.overtaken += 1
                self._require_fair(other)

    def _require_fair(self, one: Waiting) -> None:
        self.longest.overtaken = max(self.longest.overtaken, one.overtaken)
        if one.overtaken > OVERTAKEN:
            raise Violation(
                f"request {one.number} ({one.kind}) waits, and {one.overtaken} of its kind came later on other queues"
            )

    def stopped(self, since: int) -> None:
        """What was told to stop at *since* has stopped. Raises: Violation."""
        took = self._kernel.now - since
        self.longest.stop_ns = max(self.longest.stop_ns, took)
        if took > STOP:
            raise Violation(f"a stop took {took} ns after the last trouble")
