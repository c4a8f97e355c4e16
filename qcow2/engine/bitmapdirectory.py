"""Which bitmaps an image has, changed: one made, removed, cleared, enabled or disabled, merged.

Nothing else is under way, and no bits are live. What is new lies in clusters of its own, stable before one write lets
the directory, or the header, point at it; what is old is freed after. A merge only sets bits: half of it is too much.
"""

import os

from qcow2.engine.bitmapheader import set_bitmaps
from qcow2.engine.bitmaps import Bitmaps
from qcow2.engine.bitmaptable import StoredBitmap, bits_nbytes, set_bits, set_runs, table_entries
from qcow2.engine.opened import Opened
from qcow2.engine.part import Part
from qcow2.engine.rollback import Rollback
from qcow2.engine.root import Root
from qcow2.engine.space import Space
from qcow2.error import BitmapError
from qcow2.format import layout
from qcow2.format.bitmap import Bitmap
from qcow2.format.layout import ENTRY_SIZE, BitmapFlags, BitmapRecord, BitmapsRecord

DEFAULT_GRANULARITY_BITS = (12, 16)  # of a cluster, but no less and no more than these


class BitmapDirectory(Part):
    """Changes the bitmaps of one image that is open for writing."""

    def __init__(self, opened: Opened, root: Root, space: Space, bitmaps: Bitmaps) -> None:
        super().__init__(opened, root, space)
        self._bitmaps = bitmaps

    def find(self, name: str, *, is_used: bool = True) -> StoredBitmap:
        """The bitmap *name*; one that is to be *used* must make sense. Raises: BitmapError."""
        for each in self._bitmaps.stored:
            if each.bitmap.raw_name == os.fsencode(name):
                if is_used and each.bitmap.is_in_use:
                    raise BitmapError(f"Bitmap '{name}' is inconsistent and cannot be used")
                if is_used and each.problem:
                    raise BitmapError(f"Bitmap '{name}' {each.problem}")
                return each
        raise BitmapError(f"Dirty bitmap '{name}' not found")

    async def add(self, name: str, granularity: int | None, *, enabled: bool) -> None:
        """Make an empty bitmap; stable on return. Raises: BitmapError, UnsupportedImage, OSError."""
        if not self._geometry.size:
            raise BitmapError("a disk of 0 bytes has no bitmaps: QEMU would not open it")
        bits = self._granularity_bits(granularity)
        self._require_new(name, bits)
        nentries = table_entries(self._geometry.size, bits, self._geometry)
        area = await self._allocator.allocate_area(self._geometry.clusters(nentries * ENTRY_SIZE))
        async with Rollback(self._reaper.free, area):
            raw_name = os.fsencode(name)
            offset, flags = area.start << self._geometry.cluster_bits, int(BitmapFlags.AUTO) if enabled else 0
            record = BitmapRecord(offset, nentries, flags, layout.BITMAP_TYPE_DIRTY, bits, len(raw_name), 0)
            bitmap = Bitmap(record, name, 0, b"", raw_name)
            await self._publish([*(each.bitmap for each in self._bitmaps.stored), bitmap])

    def _granularity_bits(self, granularity: int | None) -> int:
        if not granularity:
            low, high = DEFAULT_GRANULARITY_BITS
            return max(low, min(self._geometry.cluster_bits, high))
        bits = granularity.bit_length() - 1
        limits = layout.MIN_BITMAP_GRANULARITY_BITS, layout.MAX_BITMAP_GRANULARITY_BITS
        if granularity != 1 << bits or not limits[0] <= bits <= limits[1]:
            raise BitmapError("Granularity must be power of 2 and at least 512")
        return bits

    def _require_new(self, name: str, granularity_bits: int) -> None:
        nbytes = len(os.fsencode(name))
        if not nbytes:
            raise BitmapError("Bitmap name cannot be empty")
        if "\0" in name:
            raise BitmapError(f"Bitmap name {name!r} has a zero byte")
        if nbytes > layout.MAX_BITMAP_NAME_BYTES:
            raise BitmapError(f"Name length exceeds maximum ({layout.MAX_BITMAP_NAME_BYTES} characters)")
        if self._geometry.version < 3:
            raise BitmapError("Cannot store dirty bitmaps in qcow2 v2 files")
        if any(each.bitmap.raw_name == os.fsencode(name) for each in self._bitmaps.stored):
            raise BitmapError(f"Bitmap already exists: {name}")
        if len(self._bitmaps.stored) == layout.MAX_BITMAPS:
            raise BitmapError(f"Maximum number of persistent bitmaps is already reached: {layout.MAX_BITMAPS}")
        if (bits := bits_nbytes(self._geometry.size, granularity_bits)) > layout.MAX_BITMAP_BYTES:
            raise BitmapError(f"Bitmap '{name}' would have {bits} bytes of bits, limit {layout.MAX_BITMAP_BYTES}")

    async def remove(self, name: str) -> None:
        """Forget a bitmap, also one that makes no sense; stable on return. Raises: BitmapError, OSError."""
        gone = self.find(name, is_used=False)
        freed = gone.clusters(self._geometry)
        await self._publish([each.bitmap for each in self._bitmaps.stored if each is not gone])
        await self._reaper.free(freed)

    async def clear(self, name: str) -> None:
        """Let no bit of a bitmap be set; stable on return. Raises: BitmapError, OSError."""
        each = self.find(name)
        freed = each.clusters(self._geometry)
        area = await self._allocator.allocate_area(self._geometry.clusters(len(each.table) * ENTRY_SIZE))
        offset = area.start << self._geometry.cluster_bits
        async with Rollback(self._reaper.free, area):
            await self._root.allow_uncounted()
            await self._stability.sync()
            where = each.bitmap.host_offset + layout.BITMAP_TABLE_OFFSET
            await self._stability.write(where, layout.FEATURE_WORD.pack(offset))
        await self._stability.sync()
        await self._bitmaps.reload()
        await self._reaper.free(freed)

    async def enable(self, name: str, *, on: bool) -> None:
        """Let a bitmap record from now on, or not any more; stable on return. Raises: BitmapError, OSError."""
        each = self.find(name)
        flags = each.bitmap.record.flags | BitmapFlags.AUTO
        await self._bitmaps.write_flags(each, flags if on else flags ^ BitmapFlags.AUTO)
        await self._stability.sync()
        await self._bitmaps.reload()

    async def merge(self, name: str, bits: bytes, granularity_bits: int, size: int) -> None:
        """Set in a bitmap what is set in *bits*, of a disk of *size* bytes; stable on return.

        Raises: BitmapError, OSError; then a part may be set.
        """
        each = self.find(name)
        if size != self._geometry.size:
            sizes = f"(destination size is {self._geometry.size}, source size is {size})"
            raise BitmapError(f"Bitmaps are of different sizes {sizes} and can't be merged")
        old = await self._bitmaps.read_bits(each)
        wanted = bytearray(old)
        for start, end in set_runs(bits):
            first = start << granularity_bits >> each.bitmap.record.granularity_bits
            last = min(end << granularity_bits, size) - 1 >> each.bitmap.record.granularity_bits
            set_bits(wanted, first, last)
        await self._bitmaps.write_all(each, old, bytes(wanted))

    async def _publish(self, wanted: list[Bitmap]) -> None:
        """Let the image have these bitmaps, whose tables are written; the old directory is free then."""
        geometry, content = self._geometry, b"".join(bitmap.pack() for bitmap in wanted)
        old = self._bitmaps.directory_clusters()
        if not wanted:
            await set_bitmaps(self._root, None)
        else:
            area = await self._allocator.allocate_area(geometry.clusters(len(content)))
            async with Rollback(self._reaper.free, area):
                offset = area.start << geometry.cluster_bits
                await self._stability.write(offset, content)
                await self._root.allow_uncounted()
                await self._stability.sync()
                record = BitmapsRecord(len(wanted), 0, len(content), offset)
                await set_bitmaps(self._root, record)
        self._root.broken_promises = self._root.breakable ^ (layout.Autoclear.BITMAPS if wanted else 0)
        await self._bitmaps.reload()
        await self._reaper.free(old)
