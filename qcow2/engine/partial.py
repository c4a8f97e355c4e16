"""Writes of parts of sectors that are encrypted as a whole: each is read, changed and written, with nobody between."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

from qcow2.driver.buffer import MemoryBuffer, zeroed
from qcow2.driver.operation import Buffer, Grace
from qcow2.engine.rangelock import RangeLocks
from qcow2.format.layout import SECTOR_SIZE

Transfer = Callable[[int, Buffer], Awaitable[None]]


def is_partial(guest_offset: int, nbytes: int) -> bool:
    """Whether the range begins or ends inside a sector."""
    return (guest_offset | nbytes) % SECTOR_SIZE != 0


def _pieces(guest_offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Where the parts of sectors and the whole ones begin, and their bytes."""
    head = min(-guest_offset % SECTOR_SIZE, nbytes)
    tail = (nbytes - head) % SECTOR_SIZE
    for piece in (head, nbytes - head - tail, tail):
        if piece:
            yield guest_offset, piece
        guest_offset += piece


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

    async def write(
        self, guest_offset: int, source: Buffer, read: Transfer, write: Transfer, write_whole: Transfer
    ) -> None:
        """Put *source* at *guest_offset*: a part of the first sector, and of the last, and whole ones in between.

        *read* and *write* are of whole sectors that nobody else writes to, *write_whole* of those that others may.
        """
        for start, nbytes in _pieces(guest_offset, len(source)):
            piece = source.slice(start - guest_offset, nbytes)
            if is_partial(start, nbytes):
                await self._change(start, piece, read, write)
            else:
                await write_whole(start, piece)

    async def _change(self, guest_offset: int, source: Buffer, read: Transfer, write: Transfer) -> None:
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
