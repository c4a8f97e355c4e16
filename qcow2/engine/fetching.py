"""What shows through from below becomes the image's own: the disk shows the same at every moment.

It is linked under the locks of its clusters, as a write is: stable before, or waiting in the log. What a guest writes
meanwhile comes before it, and is kept, or after it, and replaces it.
"""

from qcow2.driver.buffer import MemoryBuffer
from qcow2.engine.mapping import Mapping
from qcow2.engine.write import Writer
from qcow2.engine.zeroing import Zeroer
from qcow2.format.geometry import Geometry
from qcow2.plane.l2cache import Kind


class Fetcher:
    """Gives one image what it does not have itself."""

    def __init__(self, geometry: Geometry, mapping: Mapping, writer: Writer, zeroer: Zeroer) -> None:
        self._geometry = geometry
        self._mapping = mapping
        self._writer = writer
        self._zeroer = zeroer

    async def fetch(self, guest_offset: int, nbytes: int, content: memoryview | None) -> None:
        """Let the image have *content*, which shows through in the range, or zeros; where it has something, that stays.

        The range is whole clusters, but at the end of the disk. Awaits the locks of a slice at a time.
        Raises: ValueError, OSError, CorruptImage.
        """
        start, end = guest_offset, guest_offset + nbytes
        if start % self._geometry.cluster_size or (end % self._geometry.cluster_size and end != self._geometry.size):
            raise ValueError(f"{nbytes} bytes at {guest_offset} are not whole clusters")
        while start < end:
            stop = min(end, self._geometry.slice_end(start))
            first, last = self._geometry.cluster_of(start), self._geometry.cluster_of(stop - 1)
            async with self._writer.locks.hold(first, last):
                inside = None if content is None else content[start - guest_offset : stop - guest_offset]
                await self._fetch_held(start, stop, inside)
            start = stop

    async def _fetch_held(self, guest_offset: int, end: int, content: memoryview | None) -> None:
        start = guest_offset
        while start < end:
            run = await self._mapping.resolve(start, end - start)
            stop = start + run.nbytes
            if run.kind == Kind.UNALLOCATED and content is None:
                await self._zeroer.cover(start, stop)
            elif run.kind == Kind.UNALLOCATED and content is not None:
                await self._writer.write_held(start, MemoryBuffer(content[start - guest_offset : stop - guest_offset]))
            start = stop
