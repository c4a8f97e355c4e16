"""Locks on ranges of numbers, between coroutines of one scheduler: first come, first served.

A request costs the same however many are under way. A hold joins the queue of each number it covers; a wide one joins
those of whole blocks instead, so that no hold has more than a few dozen. Who holds numbers in a block shares the block
with others who do; who holds the block has it alone. Widths are rounded up to blocks: a wide hold may exclude
neighbours that it does not overlap.
"""

from collections import deque
from typing import Protocol

from qcow2.driver.operation import Grace, Signal

NARROW = 32  # numbers that a hold takes one by one, or blocks
BLOCK_BITS = 9  # of a block: the clusters of the largest slice, within which wide holds stay


class Watcher(Protocol):
    """Somebody who is no coroutine, and is told of each range from when it is asked for to when it is given back.

    It may be there itself, with something begun before that, and begins nothing more.
    """

    def lock(self, first: int, last: int) -> None: ...
    def is_there(self, first: int, last: int) -> bool: ...
    def unlock(self, first: int, last: int) -> None: ...


class Nobody:
    """Watches nothing."""

    def lock(self, first: int, last: int) -> None: ...
    def is_there(self, first: int, last: int) -> bool:
        """Begins nothing."""
        return False

    def unlock(self, first: int, last: int) -> None: ...


class _Place:
    """A block, or everything: who has it, all together or one alone, and who waits, in the order they came."""

    __slots__ = ("is_shared", "nheld", "waiting")

    def __init__(self) -> None:
        self.nheld = 0
        self.is_shared = True
        self.waiting: deque[tuple[Hold, bool]] | None = None  # and whether each would share

    def join(self, hold: "Hold", *, shares: bool) -> bool:
        """Whether *hold* has the place at once; if not, its `receive` is called when it does."""
        if not self.nheld or (shares and self.is_shared and not self.waiting):
            self.nheld += 1
            self.is_shared = shares
            return True
        if self.waiting is None:
            self.waiting = deque()
        self.waiting.append((hold, shares))
        return False

    def leave(self) -> None:
        """Give it back; the next, or all next that share, have it."""
        self.nheld -= 1
        while self.waiting and (not self.nheld or (self.is_shared and self.waiting[0][1])):
            hold, self.is_shared = self.waiting.popleft()
            self.nheld += 1
            hold.receive()


class RangeLocks:
    """Who holds a range excludes who wants one that overlaps it.

    Everybody waits only for those who came before, so there is no deadlock among holders of one range each.
    """

    def __init__(self, watcher: Watcher | None = None) -> None:
        self.watcher = watcher or Nobody()
        self._numbers: dict[int, deque[Hold] | None] = {}  # that are held, each with those who wait for it
        self._blocks: dict[int, _Place] = {}
        self._everything = _Place()

    def hold(self, first: int, last: int) -> "Hold":
        """Ask for the numbers from *first* to *last* inclusive; `async with` waits for them and gives them back."""
        return Hold(self, first, last)

    def join(self, hold: "Hold", first: int, last: int) -> int:
        """Queue *hold* for all that it needs -> how many places it must wait for."""
        missing = 0
        is_narrow = last - first < NARROW
        if is_narrow:
            numbers = self._numbers
            for number in range(first, last + 1):
                if number in numbers:
                    missing += 1
                    waiting = numbers[number]
                    if waiting is None:
                        waiting = numbers[number] = deque()
                    waiting.append(hold)
                else:
                    numbers[number] = None
        first, last = first >> BLOCK_BITS, last >> BLOCK_BITS
        is_wide = last - first >= NARROW
        if not is_wide:
            for block in range(first, last + 1):
                place = self._blocks.get(block)
                if place is None:
                    place = self._blocks[block] = _Place()
                missing += not place.join(hold, shares=is_narrow)
        missing += not self._everything.join(hold, shares=not is_wide)
        return missing

    def leave(self, first: int, last: int) -> None:
        """Give back what a hold of *first* to *last* has."""
        if last - first < NARROW:
            for number in range(first, last + 1):
                waiting = self._numbers[number]
                if waiting:
                    waiting.popleft().receive()
                else:
                    del self._numbers[number]
        first, last = first >> BLOCK_BITS, last >> BLOCK_BITS
        if last - first < NARROW:
            for block in range(first, last + 1):
                place = self._blocks[block]
                place.leave()
                if not place.nheld:
                    del self._blocks[block]
        self._everything.leave()


class Hold:
    """A range that is held, or waited for, inside `async with`."""

    __slots__ = ("_first", "_last", "_locks", "_missing", "_received", "was_immediate")

    def __init__(self, locks: RangeLocks, first: int, last: int) -> None:
        self._first: int = first
        self._last: int = last
        self._locks = locks
        self._received: Signal | None = None
        self._missing = locks.join(self, first, last)
        locks.watcher.lock(first, last)
        self.was_immediate = not self._missing  # nothing else ran between asking and holding

    def receive(self) -> None:
        """One of the places waited for is ours now."""
        self._missing -= 1
        if not self._missing and self._received is not None:
            self._received.set()

    async def __aenter__(self) -> "Hold":
        if self._missing:
            self._received = Signal()
            await self._received.wait()
        watcher = self._locks.watcher
        while watcher.is_there(self._first, self._last):
            self.was_immediate = False
            await Grace()  # of its transfers, which may be followed by others
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._locks.watcher.unlock(self._first, self._last)
        self._locks.leave(self._first, self._last)


class Mutex:
    """One holder at a time, first come, first served."""

    def __init__(self) -> None:
        self._locks = RangeLocks()

    def hold(self) -> Hold:
        """Ask to be the one holder; `async with` waits for it and gives it back."""
        return self._locks.hold(0, 0)
