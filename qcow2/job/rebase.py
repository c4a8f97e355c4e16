"""Make an overlay show through another chain what it shows now: copy what differs, before the header names it.

Only what the overlay has not itself is looked at. Killed at any moment, it shows the same, and merely has more itself.
"""

import operator
from collections.abc import Callable

from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.operation import Compute, File
from qcow2.engine.image import Image
from qcow2.job.content import data_runs, different_units
from qcow2.job.crew import Turn, Windows
from qcow2.job.pace import Pace
from qcow2.node.extent import Extent, find_extent
from qcow2.node.node import Node

IsSameFile = Callable[[File, File], bool]


async def copy_difference(
    overlay: Image,
    new: Node | None,
    pace: Pace,
    windows: Windows | None = None,
    *,
    is_same_file: IsSameFile = operator.is_,
    is_compressed: bool = False,
) -> None:
    """Let *overlay* have what shows through it and would not with *new* in the place of its backing file; not stable.

    What both chains have at one place of a file that *is_same_file* in both is not read. Unless *is_compressed*, others
    may write to *overlay* meanwhile.
    Raises: OSError, ImageError, Cancelled.
    """
    await _Difference(overlay, new, pace, windows or Windows(), is_same_file, is_compressed).run()


class _Difference:
    def __init__(
        self,
        overlay: Image,
        new: Node | None,
        pace: Pace,
        windows: Windows,
        is_same_file: IsSameFile,
        is_compressed: bool,
    ) -> None:
        self._overlay = overlay
        self._new = new
        self._pace = pace
        self._is_same_file = is_same_file
        self._is_compressed = is_compressed
        self._unit = overlay.geometry.cluster_size
        self._windows = windows
        windows.widen(self._unit)

    async def run(self) -> None:
        async with self._windows:
            await self._walk()

    async def _walk(self) -> None:
        self._pace.begin(self._overlay.size)
        offset = 0
        while offset < (size := self._overlay.size):
            self._pace.require_going()
            await self._pace.give_way()
            old = await find_extent(self._overlay, offset, size - offset)
            stop = offset + old.nbytes
            if old.depth > 0 or not old.is_present:
                stop = await self._look_below(old, offset, stop)
            else:
                self._pace.advance(stop - offset)
            offset = stop

    async def _look_below(self, old: Extent, offset: int, end: int) -> int:
        """Begin what has to be done with the front of a stretch that comes from below; where that ends."""
        new = await self._find_new(offset, end)
        stop = min(end, offset + new.nbytes) if new is not None else end
        if self._is_same(old, new):
            self._pace.advance(stop - offset)
            return stop
        bound = offset - offset % self._unit + self._windows.nbytes
        stop = min(stop, bound)
        first = offset - offset % self._unit
        last = min(stop + -stop % self._unit, self._overlay.size)
        await self._pace.wait(last - first)
        await self._windows.start(self._copy(first, last, stop - offset, self._windows.order.next()))
        return stop

    async def _find_new(self, offset: int, end: int) -> Extent | None:
        """What the new chain has there; None for zeros past its end, or without one."""
        if self._new is None or offset >= self._new.size:
            return None
        return await find_extent(self._new, offset, min(end, self._new.size) - offset)

    async def _copy(self, start: int, end: int, nbytes: int, turn: Turn) -> None:
        """Whole clusters, which the overlay does not have."""
        with turn:
            pair = self._windows.buffers.take(), self._windows.buffers.take()
            old, new = (buffer[: end - start] for buffer in pair)
            await self._overlay.read(start, MemoryBuffer(old))
            inside = 0 if self._new is None else max(0, min(end, self._new.size) - start)
            if inside and self._new is not None:
                await self._new.read(start, MemoryBuffer(new[:inside]))
            new[inside:] = bytes(len(new) - inside)
            different = await Compute(lambda: different_units(old, new, self._unit))
            await turn.come()
            for low, high in different:
                await self._bring(start + low, old[low:high])
        for buffer in pair:
            self._windows.buffers.give(buffer)
        self._pace.advance(nbytes)

    async def _bring(self, offset: int, content: memoryview) -> None:
        """Data as data, zeros as zeros."""
        stop = 0
        for start, end in [*data_runs(content, self._unit), (len(content), len(content))]:
            if stop < start:
                await self._overlay.fetch(offset + stop, start - stop)
            if self._is_compressed and start < end:
                await self._overlay.fetch_compressed(offset + start, content[start:end])
            elif start < end:
                await self._overlay.fetch(offset + start, end - start, content[start:end])
            stop = end

    def _is_same(self, old: Extent, new: Extent | None) -> bool:
        """Whether no bytes need be looked at."""
        if new is None or new.is_zero:
            return old.is_zero
        if old.is_zero or old.host_offset is None or old.host_offset != new.host_offset:
            return False
        return self._is_same_file(old.file, new.file)
