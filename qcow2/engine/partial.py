"""Writes of parts of sectors that are encrypted as a whole: each is read, changed and written, with nobody between."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from qcow2.driver.buffer import MemoryBuffer, zeroed
from qcow2.driver.operation import Buffer, Grace
from qcow2.engine.rangelock import RangeLocks
from qcow2.format.layout import SECTOR_SIZE

Transfer = Callable[[int, Buffer], Awaitable[None]]


def is_partial(guest_offset: int, nbytes: int) -> bool:
    """Whether the range begins or ends inside a sector."""
    return (guest_offset | nbytes) % SECTOR_SIZE != 0


class PartialWrites:
    """The writes of parts of sectors that one disk has under way; no guest makes any.

    Whole sectors are written without a lock as long as there are none of these, and under theirs while there are.
    """

    def __init__(self, locks: RangeLocks, unit: int) -> None:
        """*locks* are on pieces of the disk, each of *unit* bytes."""
        self._locks = locks
        self._unit = unit
        self._count = 0

    @property
    def are_there(self) -> bool:
        """Whether writes of whole sectors have to hold their range; to be asked right before a transfer begins."""
        return self._count > 0

    async def write(self, guest_offset: int, source: Buffer, read: Transfer, write: Transfer) -> None:
        """Put *source* at *guest_offset*, by *read* and *write* of whole sectors that nobody else writes to."""
        start, end = guest_offset - guest_offset % SECTOR_SIZE, guest_offset + len(source)
        end += -end % SECTOR_SIZE
        async with self._alone(start, end):
            content = zeroed(end - start)
            await read(start, MemoryBuffer(content))
            content[guest_offset - start : guest_offset - start + len(source)] = source.load()
            await write(start, MemoryBuffer(content))

    @asynccontextmanager
    async def _alone(self, start: int, end: int) -> AsyncIterator[None]:
        self._count += 1
        try:
            async with self._locks.hold(start // self._unit, (end - 1) // self._unit):
                await Grace()  # of whole sectors whose transfers began without a lock
                yield
        finally:
            self._count -= 1
