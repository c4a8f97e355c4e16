"""Which bitmaps an image has, changed: what a plan has that is not there yet is made, and one write lets it count.

Nothing else is under way, and no bits are live. New bits, tables and a new directory lie in clusters of their own,
stable before the header points at the directory; what is old is freed after. So a death leaves all of it, or nothing.
"""

from array import array
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

from qcow2.engine.bitmapheader import set_bitmaps
from qcow2.engine.bitmapplan import BitmapPlan, Planned
from qcow2.engine.bitmaps import Bitmaps
from qcow2.engine.opened import Opened
from qcow2.engine.part import Part
from qcow2.engine.rollback import Rollback
from qcow2.engine.root import Root
from qcow2.engine.space import Space
from qcow2.format import layout
from qcow2.format.bitmap import Bitmap
from qcow2.format.layout import BitmapsRecord
from qcow2.plane.entry import bytes_of

Change = Callable[[BitmapPlan], Coroutine[Any, Any, None]]


class BitmapDirectory(Part):
    """Changes the bitmaps of one image that is open for writing."""

    def __init__(self, opened: Opened, root: Root, space: Space, bitmaps: Bitmaps) -> None:
        super().__init__(opened, root, space)
        self._bitmaps = bitmaps

    async def change(self, change: Change) -> None:
        """Let the image have the bitmaps as *change* plans them; stable on return.

        Raises: BitmapError, UnsupportedImage, OSError; whatever *change* does.
        """
        plan = BitmapPlan(self._geometry, self._bitmaps)
        await change(plan)
        if plan.is_changed:
            await self._publish(plan)

    async def _publish(self, plan: BitmapPlan) -> None:
        left = [*self._bitmaps.directory_clusters()]
        for old in (*plan.dropped, *(each.stored for each in plan.planned if each.bits is not None)):
            left += old.clusters(self._geometry) if old is not None else ()
        made: list[int] = []
        async with Rollback(self._reaper.free, made):
            await set_bitmaps(self._root, await self._make(plan.planned, made))
        self._root.broken_promises = self._root.breakable ^ (layout.Autoclear.BITMAPS if plan.planned else 0)
        await self._bitmaps.reload()
        await self._reaper.free(left)

    async def _make(self, planned: Sequence[Planned], made: list[int]) -> BitmapsRecord | None:
        """A directory of these bitmaps, stable; None for none. *made* gets the clusters of what is new."""
        content = b"".join([(await self._make_bitmap(each, made)).pack() for each in planned])
        if not content:
            return None
        offset = await self._write_area(content, made)
        await self._root.allow_uncounted()
        await self._stability.sync()
        return BitmapsRecord(len(planned), 0, len(content), offset)

    async def _make_bitmap(self, each: Planned, made: list[int]) -> Bitmap:
        if each.bits is None:
            return each.bitmap
        size = self._geometry.cluster_size
        table = array("Q", bytes(each.bitmap.record.table_size * layout.ENTRY_SIZE))
        for index, start in enumerate(range(0, len(each.bits), size)):
            if any(content := each.bits[start : start + size]):
                table[index] = await self._write_bits(content, made)
        offset = await self._write_area(bytes_of(table), made)
        return replace(each.bitmap, record=replace(each.bitmap.record, table_offset=offset))

    async def _write_bits(self, content: bytes, made: list[int]) -> int:
        """*content* in a cluster of its own, stable after the next sync; its host offset."""
        cluster = await self._allocator.allocate_zeros()
        made += cluster
        offset = cluster.start << self._geometry.cluster_bits
        await self._stability.write(offset, content)
        return offset

    async def _write_area(self, content: bytes, made: list[int]) -> int:
        """The same in as many clusters in a row as it takes."""
        area = await self._allocator.allocate_area(self._geometry.clusters(len(content)))
        made += area
        offset = area.start << self._geometry.cluster_bits
        await self._stability.write(offset, content)
        return offset
