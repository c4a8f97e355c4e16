"""Locks on ranges of numbers, between coroutines of one scheduler: first come, first served."""

from qcow2.operation import Signal


class RangeLocks:
    """Who holds a range excludes who wants one that overlaps it.

    Everybody waits only for those who came before, so there is no deadlock among holders of one range each.
    """

    def __init__(self) -> None:
        self._ranges: list[Hold] = []  # held or waited for, in the order they came

    def hold(self, first: int, last: int) -> "Hold":
        """Ask for the numbers from *first* to *last* inclusive; `async with` waits for them and gives them back."""
        return Hold(self._ranges, first, last)


class Hold:
    """A range that is held, or waited for, inside `async with`."""

    __slots__ = ("_before", "_first", "_last", "_ranges", "_released", "was_immediate")

    def __init__(self, ranges: "list[Hold]", first: int, last: int) -> None:
        self._first: int = first
        self._last: int = last
        self._released = Signal()
        self._before = [other for other in ranges if other._first <= last and first <= other._last]
        self.was_immediate = not self._before  # nothing else ran between asking and holding
        self._ranges = ranges
        ranges.append(self)

    async def __aenter__(self) -> "Hold":
        for other in self._before:
            await other._released.wait()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._ranges.remove(self)
        self._released.set()


class Mutex:
    """One holder at a time, first come, first served."""

    def __init__(self) -> None:
        self._locks = RangeLocks()

    def hold(self) -> Hold:
        """Ask to be the one holder; `async with` waits for it and gives it back."""
        return self._locks.hold(0, 0)
