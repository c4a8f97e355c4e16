"""Locks on ranges of numbers, between coroutines of one scheduler: first come, first served."""

from typing import Protocol

from qcow2.operation import Signal


class Watcher(Protocol):
    """Somebody who is no coroutine, and is told of each range from when it is asked for to when it is given back."""

    def lock(self, first: int, last: int) -> None: ...
    def unlock(self, first: int, last: int) -> None: ...


class Nobody:
    """Watches nothing."""

    def lock(self, first: int, last: int) -> None: ...
    def unlock(self, first: int, last: int) -> None: ...


class RangeLocks:
    """Who holds a range excludes who wants one that overlaps it.

    Everybody waits only for those who came before, so there is no deadlock among holders of one range each.
    """

    def __init__(self, watcher: Watcher | None = None) -> None:
        self.ranges: list[Hold] = []  # held or waited for, in the order they came
        self.watcher = watcher or Nobody()

    def hold(self, first: int, last: int) -> "Hold":
        """Ask for the numbers from *first* to *last* inclusive; `async with` waits for them and gives them back."""
        return Hold(self, first, last)


class Hold:
    """A range that is held, or waited for, inside `async with`."""

    __slots__ = ("_before", "_first", "_last", "_locks", "_released", "was_immediate")

    def __init__(self, locks: RangeLocks, first: int, last: int) -> None:
        self._first: int = first
        self._last: int = last
        self._released = Signal()
        self._before = [other for other in locks.ranges if other._first <= last and first <= other._last]
        self.was_immediate = not self._before  # nothing else ran between asking and holding
        self._locks = locks
        locks.ranges.append(self)
        locks.watcher.lock(first, last)

    async def __aenter__(self) -> "Hold":
        for other in self._before:
            await other._released.wait()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._locks.ranges.remove(self)
        self._locks.watcher.unlock(self._first, self._last)
        self._released.set()


class Mutex:
    """One holder at a time, first come, first served."""

    def __init__(self) -> None:
        self._locks = RangeLocks()

    def hold(self) -> Hold:
        """Ask to be the one holder; `async with` waits for it and gives it back."""
        return self._locks.hold(0, 0)
