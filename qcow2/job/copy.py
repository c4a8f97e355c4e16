"""Copy a source to a target: extents tell what has to be looked at, windows of that are read, searched and written.

Windows are under way side by side, as many as the crew is wide; the walk over the extents is one coroutine. Memory:
one window for each place in the crew, and what the target keeps.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.operation import LARGEST_UNIT, SCRATCH_BYTES, Compute, CopyData
from qcow2.error import ImageError
from qcow2.job.content import SPARSE_UNIT, data_runs, different_units
from qcow2.job.crew import WIDTH, WINDOW, Buffers, Turn, Windows
from qcow2.job.pace import Pace
from qcow2.job.source import Content, Piece, Source
from qcow2.job.target import Runs, Target
from qcow2.node.node import Node

GAP = 128 << 10  # bytes of zeros that are read rather than left out: two windows cost more


@dataclass(frozen=True, slots=True)
class Manner:
    """How to copy."""

    sparse_unit: int = SPARSE_UNIT  # so many zeros are left out; 0: none are, also those that the source tells of
    width: int = WIDTH  # windows at a time
    window: int = WINDOW  # bytes read at a time, no less than a cluster
    keeps_order: bool = True  # what comes later on the disk comes later in the file
    offloads: bool = False  # let the host copy what it can: data of the source stays data, whatever it is


async def copy(source: Source, target: Target, pace: Pace, manner: Manner, base: Node | None = None) -> None:
    """Let *target* hold what *source* does; stable on return. Over *base*, if there is one, only what differs from it.

    Raises: CopyFailed, Cancelled, OSError, ImageError; *target* is not whole then.
    """
    await target.begin()
    await _Copy(source, target, pace, manner, base).run()
    await target.finish()


class CopyFailed(Exception):
    """What could not be done, and where on the disk, in qemu-img's words; the cause says why."""


@contextmanager
def _blamed(what: str, offset: int) -> Iterator[None]:
    try:
        yield
    except (OSError, ImageError) as error:
        raise CopyFailed(f"error while {what} {offset}") from error


class _Copy:
    def __init__(self, source: Source, target: Target, pace: Pace, manner: Manner, base: Node | None) -> None:
        self._source = source
        self._target = target
        self._pace = pace
        self._manner = manner
        self._base = base
        self._windows = Windows(manner.width, manner.window)
        self._scratch = Buffers(SCRATCH_BYTES)
        self._under_way: set[int] = set()  # where those windows begin
        self._position = 0
        self._known = (Content.ZEROS, 0)  # the extent that was found last, and its end

    async def run(self) -> None:
        async with self._windows:
            await self._walk()

    async def _walk(self) -> None:
        size = self._source.size
        self._pace.begin(size)
        while self._position < size:
            self._pace.require_going()
            offset = self._position
            content, stop = await self._stretch(offset)
            if content is Content.DATA:
                await self._begin_window(offset, stop - offset)
            elif content is Content.ZEROS:
                await self._target.zero(offset, stop - offset)
                self._pace.advance(stop - offset)
            else:
                self._pace.advance(stop - offset)
            self._position = stop

    async def _find(self, offset: int) -> tuple[Content, int]:
        """What is at *offset*, and where that ends."""
        content, end = self._known
        if offset >= end:
            with _blamed("reading block status at offset", offset):
                content, nbytes = await self._source.find(offset)
            if content is Content.ZEROS and not self._manner.sparse_unit:
                content = Content.DATA
            end = offset + nbytes
            self._known = content, end
        return content, end

    async def _stretch(self, offset: int) -> tuple[Content, int]:
        """What to do with the front of the rest, and where that ends: at a whole unit of the target."""
        unit, size = self._target.unit, self._source.size
        content, end = await self._find(offset)
        if content is not Content.DATA:
            stop = end if end >= size else end - end % unit
            if stop <= offset:  # a unit of which this is only a part
                return Content.DATA, min(offset + unit, size)
            if content is Content.BELOW or await self._is_base_zero(offset, stop):
                return content, stop
            if self._base is None:
                return content, stop
            return Content.DATA, min(stop, offset + self._windows.nbytes)
        limit = min(offset + self._windows.nbytes, size)
        stop = min(end + -end % unit, limit)
        while stop < limit:
            content, end = await self._find(stop)
            if content is Content.BELOW or (content is Content.ZEROS and end - stop > GAP):
                break
            stop = min(end + -end % unit, limit)
        return Content.DATA, stop

    async def _is_base_zero(self, offset: int, end: int) -> bool:
        """Whether zeros show there if nothing is written."""
        if self._base is None:
            return False
        end = min(end, self._base.size)
        return offset >= end or await self._base.reads_as_zeros(offset, end - offset)

    async def _begin_window(self, offset: int, nbytes: int) -> None:
        await self._pace.wait(nbytes)
        self._under_way.add(offset)
        await self._windows.start(self._copy(offset, nbytes, self._windows.order.next()))

    async def _copy(self, offset: int, nbytes: int, turn: Turn) -> None:
        buffer = self._windows.buffers.take()
        data = buffer[:nbytes]
        try:
            with turn:
                await self._place(offset, data, turn)
        finally:
            self._under_way.discard(offset)
        self._windows.buffers.give(buffer)
        await self._target.advance(min(self._under_way, default=offset))
        self._pace.advance(nbytes)

    async def _place(self, offset: int, data: memoryview, turn: Turn) -> None:
        """Fill *data*, and put what the target needs of it there."""
        if self._base is None:
            there = await self._source.in_one_piece(offset, len(data))
            if there is not None and await self._copy_piece(there, offset, data, turn):
                return
        with _blamed("reading at byte", offset):
            runs = await self._source.look(offset, data, partial(self._runs, data))
        parts = [(0, len(data), runs)] if self._base is None else await self._different(self._base, offset, data, runs)
        packed = [await self._target.pack(data[start:end], inside) for start, end, inside in parts]
        if self._manner.keeps_order:
            await turn.come()
        places = [
            self._target.place(offset + start, end - start, inside, known)
            for (start, end, inside), known in zip(parts, packed, strict=True)
        ]
        turn.give_way()
        with _blamed("writing at byte", offset):
            for (start, end, inside), place in zip(parts, places, strict=True):
                await self._target.put(offset + start, data[start:end], inside, place)

    async def _copy_piece(self, there: Piece, offset: int, data: memoryview, turn: Turn) -> bool:
        """Copy what *data* has room for from file to file; false: it is not done."""
        if self._manner.offloads:
            await self._offload(there, offset, data, turn)
            return True
        unit, place = self._manner.sparse_unit, self._target.straight(offset)
        if place is None or not unit or LARGEST_UNIT % unit:
            return False
        scratch = self._scratch.take()
        with suppress(OSError):  # whose it is shows when it is read, and written
            await CopyData(*there, *place, len(data), unit, scratch)
            self._scratch.give(scratch)
            return True
        return False

    async def _offload(self, there: Piece, offset: int, data: memoryview, turn: Turn) -> None:
        """Have the host copy what *data* has room for, and do it ourselves if it cannot."""
        runs: Runs = [(0, len(data))]
        if self._manner.keeps_order:
            await turn.come()
        place = self._target.place(offset, len(data), runs, None)
        turn.give_way()
        with _blamed("writing at byte", offset):
            could = await self._target.take(offset, len(data), place, there)
        if not could:
            with _blamed("reading at byte", offset):
                await there.reading(data)
            with _blamed("writing at byte", offset):
                await self._target.put(offset, data, runs, place)

    def _runs(self, data: memoryview) -> Runs:
        return data_runs(data, self._manner.sparse_unit) if self._manner.sparse_unit else [(0, len(data))]

    async def _different(self, base: Node, offset: int, data: memoryview, runs: Runs) -> list[tuple[int, int, Runs]]:
        """Parts, in units of the target, that are not what shows without them: (start, end, runs inside)."""
        shown = memoryview(bytearray(len(data)))
        inside = max(0, min(len(data), base.size - offset))
        if inside:
            await base.read(offset, MemoryBuffer(shown[:inside]))
        bounds: Runs = await Compute(partial(different_units, data, shown, self._target.unit))
        return [(start, end, _clipped(runs, start, end)) for start, end in bounds]


def _clipped(runs: Runs, start: int, end: int) -> Runs:
    """What of *runs* is from *start* to *end*, counted from *start*."""
    inside = [(max(low, start) - start, min(high, end) - start) for low, high in runs]
    return [(low, high) for low, high in inside if low < high]
