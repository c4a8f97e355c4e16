"""Bring what the layers over a base have into it: data as data, zeros as zeros.

Only what the overlay or a layer between says something about is written to the base, so through the overlay nobody
sees that. Killed at any moment the overlay shows the same; done once more it ends in the same place.
"""

from qcow2.driver.buffer import MemoryBuffer
from qcow2.engine.image import Image
from qcow2.job.crew import Turn, Windows
from qcow2.job.pace import Pace
from qcow2.job.visible import require_hidden
from qcow2.node.extent import find_extent
from qcow2.node.node import Node

CLEARED = 256  # clusters of a base that are cleared at a time, within which nobody else has a turn
UNIT = 64 << 10  # bytes, of a base without clusters


async def commit(overlay: Image, base: Node, pace: Pace, windows: Windows | None = None) -> None:
    """Let *base*, which is under *overlay* and writable, hold what *overlay* shows; stable on return.

    It is as long as the overlay then, or longer. Images between the two are worth nothing any more, but through the
    overlay.
    Raises: UnsupportedImage, before anything has changed, if an internal snapshot of *overlay* sees what would.
    OSError, ImageError, ValueError, Cancelled.
    """
    depth = next(depth for depth, image in enumerate(overlay.chain) if image is base)
    await require_hidden(overlay, base, depth, pace)
    if base.size < overlay.size:
        await base.grow(overlay.size)
    await _Commit(overlay, base, depth, pace, windows or Windows()).run()
    await base.flush()


class _Commit:
    def __init__(self, overlay: Image, base: Node, depth: int, pace: Pace, windows: Windows) -> None:
        self._overlay = overlay
        self._base = base
        self._depth = depth
        self._pace = pace
        self._windows = windows
        self._span = CLEARED * (base.capabilities.cluster_size or UNIT)

    async def run(self) -> None:
        async with self._windows:
            await self._walk()

    async def _walk(self) -> None:
        size = self._overlay.size
        self._pace.begin(size)
        offset = 0
        while offset < size:
            self._pace.require_going()
            await self._pace.give_way()
            extent = await find_extent(self._overlay, offset, size - offset)
            nbytes = extent.nbytes
            if extent.depth < self._depth and not extent.is_zero:
                nbytes = min(nbytes, self._windows.nbytes)
                await self._pace.wait(nbytes)
                await self._windows.start(self._copy(offset, nbytes, self._windows.order.next()))
            elif extent.depth < self._depth:  # also where an image between is too short to show the base
                nbytes = min(nbytes, self._span)
                await self._pace.wait(0)
                await self._windows.start(self._clear(offset, nbytes))
            else:
                self._pace.advance(nbytes)
            offset += nbytes

    async def _copy(self, offset: int, nbytes: int, turn: Turn) -> None:
        buffer = self._windows.buffers.take()
        data = MemoryBuffer(buffer[:nbytes])
        with turn:
            await self._overlay.read(offset, data)
            await turn.come()
            await self._base.write(offset, data)
        self._windows.buffers.give(buffer)
        self._pace.advance(nbytes)

    async def _clear(self, offset: int, nbytes: int) -> None:
        if not await self._base.reads_as_zeros(offset, nbytes):
            await self._base.write_zeroes(offset, nbytes, unmap=True)
        self._pace.advance(nbytes)
