"""Locks on ranges of numbers, between coroutines of one scheduler: first come, first served."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from qcow2.operation import Signal


class RangeLocks:
    """Who holds a range excludes who wants one that overlaps it.

    Everybody waits only for those who came before, so there is no deadlock among holders of one range each.
    """

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int, Signal]] = []  # first, last, released; held or waited for, as they came

    @asynccontextmanager
    async def hold(self, first: int, last: int) -> AsyncIterator[None]:
        """Hold the numbers from *first* to *last* inclusive."""
        mine = (first, last, Signal())
        before = [other for other in self._ranges if other[0] <= last and first <= other[1]]
        self._ranges.append(mine)
        try:
            for _, _, released in before:
                await released.wait()
            yield
        finally:
            self._ranges.remove(mine)
            mine[2].set()


class Mutex:
    """One holder at a time, first come, first served."""

    def __init__(self) -> None:
        self._locks = RangeLocks()

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        """Be the one holder."""
        async with self._locks.hold(0, 0):
            yield
