"""The header of an open image: pointers to tables, switched one sector at a time, and the dirty bit."""

from collections.abc import Awaitable
from dataclasses import replace

from qcow2 import layout
from qcow2.header import Header, mark_clean, mark_dirty
from qcow2.operation import File
from qcow2.rangelock import Mutex
from qcow2.stability import Stability


class Root:
    """The one place that changes cluster 0 while the image is open."""

    def __init__(self, file: File, header: Header, stability: Stability, *, is_lazy: bool) -> None:
        self.header = header
        self.is_lazy = is_lazy  # refcounts need not be right on the disk, once the dirty bit is stable
        self._must_mark = is_lazy  # an image that is dirty already is never opened for writing
        self._file = file
        self._stability = stability
        self._mutex = Mutex()

    async def allow_uncounted(self) -> None:
        """Return once references may be linked that the refcounts on the disk do not count (law 4).

        Lazy: the dirty bit is stable then. Accurate: at once, since every cluster is counted before it is handed out.
        """
        if self._must_mark:
            async with self._mutex.hold():
                if self._must_mark:
                    self.header = await self._trusted(mark_dirty(self._file, self.header))
                    self._must_mark = False

    async def mark_clean(self) -> None:
        """Clear the dirty bit, if it is set; everything else is written."""
        if self.header.is_dirty:
            self.header = await self._trusted(mark_clean(self._file, self.header))

    async def _trusted(self, change: Awaitable[Header]) -> Header:
        self._stability.require_trust()
        try:
            return await change
        except OSError as error:
            self._stability.fail(error)
            raise

    async def set_refcount_table(self, host_offset: int, nclusters: int) -> None:
        """Let the header point at another refcount table, which is stable; stable on return."""
        packed = layout.HEADER_REFCOUNT_TABLE.pack(host_offset, nclusters)
        await self._stability.write(layout.HEADER_REFCOUNT_TABLE_OFFSET, packed)
        await self._stability.sync()
        record = replace(self.header.record, refcount_table_offset=host_offset, refcount_table_clusters=nclusters)
        self.header = replace(self.header, record=record)
