"""Copy a source to a target: extents tell what has to be looked at, windows of that are read, searched and written.

A window is what lies between holes, some stretches at a time: each step of one costs the same, however much it moves.
Windows are under way side by side, as many as the crew is wide; the walk over the extents is one coroutine. Memory:
one window for each place in the crew, and what the target keeps.
"""

from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.operation import Compute, Together, Write
from qcow2.format.layout import MAX_CLUSTER_SIZE
from qcow2.job.blame import WRITING, blamed
from qcow2.job.content import SPARSE_UNIT, data_runs, different_units
from qcow2.job.crew import WIDTH, Turn, Windows
from qcow2.job.filetofile import FileToFile, Stretch
from qcow2.job.pace import Pace
from qcow2.job.source import Content, Source
from qcow2.job.target import Runs, Target
from qcow2.node.node import Node

GAP = 128 << 10  # bytes of zeros that are read rather than left out: two stretches cost more
WINDOW = 4 << 20  # bytes
WINDOW_WITH_RATE = MAX_CLUSTER_SIZE
MAX_STRETCHES = 32  # of a window: the tables that it may touch are kept until it is done


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
    with blamed(WRITING, source.size):
        await target.finish()


class _Copy:
    def __init__(self, source: Source, target: Target, pace: Pace, manner: Manner, base: Node | None) -> None:
        self._source = source
        self._target = target
        self._pace = pace
        self._manner = manner
        self._base = base
        self._windows = Windows(
            manner.width, min(manner.window, WINDOW_WITH_RATE) if pace.is_limited else manner.window
        )
        self._file_to_file = FileToFile(
            source, target, manner.sparse_unit, keeps_order=manner.keeps_order, offloads=manner.offloads
        )
        self._under_way: set[int] = set()  # where those windows begin
        self._position = 0
        self._known = (Content.ZEROS, 0)  # the extent that was found last, and its end
        self._gathered: list[tuple[int, int]] = []  # (offset, bytes) of what is to be the next window
        self._ngathered = 0  # bytes
        self._gathers = base is None and not manner.offloads

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
                await self._gather(offset, stop - offset)
            elif content is Content.ZEROS:
                with blamed(WRITING, offset):
                    await self._target.zero(offset, stop - offset)
                self._pace.advance(stop - offset)
            else:
                self._pace.advance(stop - offset)
            self._position = stop
        if self._gathered:
            await self._begin_window()

    async def _find(self, offset: int) -> tuple[Content, int]:
        """What is at *offset*, and where that ends."""
        content, end = self._known
        if offset >= end:
            with blamed("reading block status at offset", offset):
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
        limit = min(offset + self._windows.nbytes - self._ngathered, size)
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

    async def _gather(self, offset: int, nbytes: int) -> None:
        self._gathered.append((offset, nbytes))
        self._ngathered += nbytes
        is_full = self._ngathered + GAP > self._windows.nbytes or len(self._gathered) == MAX_STRETCHES
        if is_full or not self._gathers:
            await self._begin_window()

    async def _begin_window(self) -> None:
        gathered, self._gathered = self._gathered, []
        nbytes, self._ngathered = self._ngathered, 0
        await self._pace.wait(nbytes)
        self._under_way.add(gathered[0][0])
        await self._windows.start(self._copy(gathered, nbytes, self._windows.order.next()))

    async def _copy(self, gathered: list[tuple[int, int]], nbytes: int, turn: Turn) -> None:
        first = gathered[0][0]
        buffer = self._windows.buffers.take()
        stretches, rest = [], buffer
        for offset, length in gathered:
            stretches.append(Stretch(offset, rest[:length]))
            rest = rest[length:]
        try:
            with turn:
                await self._place(stretches, turn)
        finally:
            self._under_way.discard(first)
        self._windows.buffers.give(buffer)
        with blamed(WRITING, first):
            await self._target.advance(min(self._under_way, default=first))
        self._pace.advance(nbytes)

    async def _place(self, stretches: list[Stretch], turn: Turn) -> None:
        """Fill the memory of *stretches*, and put what the target needs of them there."""
        if self._base is None and await self._file_to_file.copy(stretches, turn):
            return
        parts = [
            (offset + start, data[start:end], inside)
            for (offset, data), runs in zip(stretches, await self._look(stretches), strict=True)
            for start, end, inside in await self._needed(offset, data, runs)
        ]
        packed = [await self._target.pack(data, inside) for _, data, inside in parts]
        if self._manner.keeps_order:
            await turn.come()
        puts = [
            (offset, data, inside, self._target.place(offset, len(data), inside, known))
            for (offset, data, inside), known in zip(parts, packed, strict=True)
        ]
        turn.give_way()
        plain = self._target.plain
        if plain is not None:
            writes = [
                Write(at.file, at.host_offset, data[start:end], data=True)
                for offset, data, inside, place in puts
                for start, end, at in plain.spots(offset, inside, place)
            ]
            with suppress(OSError):  # where it was shows when they are written one after the other
                if writes:
                    await Together(writes)
                return
        for put in puts:
            with blamed(WRITING, put[0]):
                await self._target.put(*put)

    async def _look(self, stretches: list[Stretch]) -> list[Runs]:
        """Fill the memory of *stretches*. -> of each, what is not zeros."""
        pieces = [await self._source.in_one_piece(offset, len(data)) for offset, data in stretches]
        if len(stretches) > 1 and None not in pieces:
            reading = [there.reading(each.data) for there, each in zip(pieces, stretches, strict=True) if there]
            with suppress(OSError):  # where it was shows when they are read one after the other
                looked: list[Runs] = await Together(reading, partial(self._runs_of, stretches))
                return looked
        found = []
        for offset, data in stretches:
            with blamed("reading at byte", offset):
                found.append(await self._source.look(offset, data, partial(self._runs, data)))
        return found

    async def _needed(self, offset: int, data: memoryview, runs: Runs) -> list[tuple[int, int, Runs]]:
        """Parts that the target needs: (start, end, runs inside)."""
        return [(0, len(data), runs)] if self._base is None else await self._different(self._base, offset, data, runs)

    def _runs_of(self, stretches: list[Stretch]) -> list[Runs]:
        return [self._runs(data) for _, data in stretches]

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
