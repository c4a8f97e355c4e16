"""Bitmaps that fit a disk of another size, or say of all of it that it has changed: made beforehand, and switched to.

The new tables and the new directory are stable before the one write that changes the size of the disk names them, too:
no death leaves bitmaps of another size than the disk's.
"""

from array import array
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from qcow2.driver.operation import Read
from qcow2.engine.bitmapheader import hoist
from qcow2.engine.bitmaps import Bitmaps
from qcow2.engine.bitmaptable import StoredBitmap, set_bits
from qcow2.engine.opened import Opened
from qcow2.engine.part import Part
from qcow2.engine.rollback import Rollback
from qcow2.engine.root import BitmapsPlace, Root
from qcow2.engine.space import Space
from qcow2.error import UnsupportedImage
from qcow2.format import layout
from qcow2.format.bitmap import Bitmap, table_entries
from qcow2.format.layout import BITMAP_ENTRY_ALL_ONES, BitmapsRecord
from qcow2.plane.entry import bytes_of


@dataclass(slots=True)
class Fitted:
    """What was made, and what is free once it counts: host clusters."""

    made: list[int] = field(default_factory=list)
    left: list[int] = field(default_factory=list)


class BitmapFitting(Part):
    """Fits the bitmaps of one image to its disk, while nothing else is under way."""

    def __init__(self, opened: Opened, root: Root, space: Space, bitmaps: Bitmaps) -> None:
        super().__init__(opened, root, space)
        self._bitmaps = bitmaps

    async def change(self, size: int, change: Coroutine[Any, Any, None], *, all_dirty: bool = False) -> None:
        """Await *change*, which lets the disk be *size* bytes long in one write of the header; the bitmaps with it.

        What is new of the disk, or *all* of it, is dirty in those that record.
        Raises: UnsupportedImage, OSError; whatever *change* does.
        """
        try:
            await self._bitmaps.settle()
            if not self._bitmaps.stored or (size == self._geometry.size and not all_dirty):
                await change
                return
            await self._bitmaps.give_up()  # `reload` would take for stable what its sync has failed to make so
        except BaseException:
            change.close()
            raise
        fitted = Fitted()
        async with Rollback(self._look_anew, fitted):
            try:
                self._root.next_bitmaps = await self._fit(size, fitted, all_dirty=all_dirty)
                await change
            except BaseException:
                change.close()
                if self._root.next_bitmaps is not None or not fitted.left:
                    self._root.next_bitmaps = None
                    fitted.left = fitted.made
                raise
        await self._look_anew(fitted)

    async def _look_anew(self, fitted: Fitted) -> None:
        """The bitmaps are those that the file has by now; what is left of the others is free."""
        if self._stability.error is None:
            await self._bitmaps.reload()
            await self._reaper.free(fitted.left)

    async def _fit(self, size: int, fitted: Fitted, *, all_dirty: bool) -> BitmapsPlace:
        """The bitmaps of a disk of *size* bytes, stable; what the header shall say of them."""
        place = await hoist(self._root)
        left = [*self._bitmaps.directory_clusters()]
        wanted = [
            await self._fit_bitmap(each, size, fitted, left, all_dirty=all_dirty) for each in self._bitmaps.stored
        ]
        content = b"".join(bitmap.pack() for bitmap in wanted)
        offset = await self._write(content, fitted)
        await self._root.allow_uncounted()
        await self._stability.sync()
        fitted.left = left
        return BitmapsPlace(place, BitmapsRecord(len(wanted), 0, len(content), offset).pack())

    async def _fit_bitmap(
        self, each: StoredBitmap, size: int, fitted: Fitted, left: list[int], *, all_dirty: bool
    ) -> Bitmap:
        if each.bitmap.is_in_use or each.problem:
            return each.bitmap
        table = await self._table(each, size, fitted, all_dirty=all_dirty)
        if table == each.table:
            return each.bitmap
        kept = set(table)
        left += each.table_clusters(self._geometry)
        left += [offset >> self._geometry.cluster_bits for offset in each.data_clusters() if offset not in kept]
        offset = await self._write(bytes_of(table), fitted)
        return replace(each.bitmap, record=replace(each.bitmap.record, table_offset=offset, table_size=len(table)))

    async def _table(self, each: StoredBitmap, size: int, fitted: Fitted, *, all_dirty: bool) -> "array[int]":
        """The table of the bitmap for a disk of *size* bytes."""
        bits = each.bitmap.record.granularity_bits
        nentries = table_entries(size, bits, self._geometry)
        if -(-size >> bits) > layout.MAX_BITMAP_BYTES * 8:
            message = (
                f"size {size} is too large for bitmap {each.bitmap.name!r}, limit {layout.MAX_BITMAP_BYTES << 3 + bits}"
            )
            raise UnsupportedImage(self._file.path, message)
        if all_dirty and each.is_kept:
            return array("Q", [BITMAP_ENTRY_ALL_ONES]) * nentries
        old_size = self._geometry.size
        table = each.table[:nentries]
        table.extend([BITMAP_ENTRY_ALL_ONES if each.is_kept else 0] * (nentries - len(table)))
        per_cluster = self._geometry.cluster_size * 8
        if size > old_size and each.is_kept:
            first = old_size >> bits
            index, start = divmod(first, per_cluster)
            if index < len(each.table) and table[index] != BITMAP_ENTRY_ALL_ONES:
                last = min((size - 1 >> bits) - index * per_cluster, per_cluster - 1)
                table[index] = await self._changed(table[index], fitted, set_from=start, last=last)
        elif size < old_size:
            index, last = divmod((size - 1 >> bits) if size else 0, per_cluster)
            if table[index] > BITMAP_ENTRY_ALL_ONES:
                table[index] = await self._changed(table[index], fitted, last=last if size else -1)
        return table

    async def _changed(self, entry: int, fitted: Fitted, *, set_from: int | None = None, last: int) -> int:
        """A cluster with the bits that *entry* leads to up to *last*, from *set_from* on all of them set."""
        size = self._geometry.cluster_size
        content = bytearray(await Read(self._file, entry, size) if entry else size)
        if set_from is not None:
            set_bits(content, set_from, last)
        kept = (1 << last + 1) - 1
        whole = int.from_bytes(content, "little") & kept
        return await self._write(whole.to_bytes(size, "little"), fitted)

    async def _write(self, content: bytes, fitted: Fitted) -> int:
        """*content* in clusters of its own, stable after the next sync; their host offset."""
        bits = self._geometry.cluster_bits
        area = await self._allocator.allocate_area(self._geometry.clusters(len(content)))
        fitted.made += area
        await self._stability.write(area.start << bits, content)
        return area.start << bits
