"""Which bitmaps an image shall have: steps that only plan, so that all of them count together, or none."""

import os
from dataclasses import dataclass, replace

from qcow2.engine.bitmaps import Bitmaps
from qcow2.engine.bitmaptable import StoredBitmap, set_bits, set_runs
from qcow2.error import BitmapError
from qcow2.format import layout
from qcow2.format.bitmap import Bitmap, bits_nbytes, table_entries
from qcow2.format.geometry import Geometry
from qcow2.format.layout import BitmapFlags, BitmapRecord
from qcow2.plane.dirtybits import MAX_LIVE_BYTES

DEFAULT_GRANULARITY_BITS = (12, 16)  # of a cluster, but no less and no more than these


@dataclass(slots=True)
class Planned:
    """A bitmap as it shall be."""

    bitmap: Bitmap
    stored: StoredBitmap | None  # as it is; None: it is new
    bits: bytes | None = None  # None: those that it has; zeros follow

    @property
    def is_changed(self) -> bool:
        """Whether it is not as it was."""
        return self.stored is None or self.bits is not None or self.bitmap != self.stored.bitmap


class BitmapPlan:
    """The bitmaps of an image, from as they are to as they shall be. A step that raises has changed nothing of it."""

    def __init__(self, geometry: Geometry, bitmaps: Bitmaps) -> None:
        self._geometry = geometry
        self._bitmaps = bitmaps
        self.planned = [Planned(each.bitmap, each) for each in bitmaps.stored]

    @property
    def dropped(self) -> list[StoredBitmap]:
        """Those that are there and shall not be."""
        kept = [each.stored for each in self.planned]
        return [each for each in self._bitmaps.stored if each not in kept]

    @property
    def is_changed(self) -> bool:
        """Whether the bitmaps are not to stay as they are."""
        return bool(self.dropped) or any(each.is_changed for each in self.planned)

    def _find(self, name: str, *, is_used: bool = True, is_changed: bool = True) -> Planned:
        """The bitmap *name*; one that is to be *used* must make sense, and nobody holds one that is *changed*."""
        for each in self.planned:
            if each.bitmap.raw_name == os.fsencode(name):
                if is_used and each.bitmap.is_in_use:
                    raise BitmapError(f"Bitmap '{name}' is inconsistent and cannot be used")
                if is_used and each.stored is not None and each.stored.problem:
                    raise BitmapError(f"Bitmap '{name}' {each.stored.problem}")
                if is_changed and self._bitmaps.is_frozen(each.bitmap.raw_name):
                    raise BitmapError(f"Bitmap '{name}' is currently in use by another operation and cannot be used")
                return each
        raise BitmapError(f"Dirty bitmap '{name}' not found")

    def find_stored(self, name: str) -> StoredBitmap:
        """The bitmap *name*, which is there, makes sense, and is held by nobody. Raises: BitmapError."""
        stored = self._find(name).stored
        assert stored is not None  # nothing was planned
        return stored

    async def add(self, name: str, granularity: int | None, *, enabled: bool) -> None:
        """Have an empty bitmap, a bit for *granularity* bytes. Raises: BitmapError."""
        if not self._geometry.size:
            raise BitmapError("a disk of 0 bytes has no bitmaps: QEMU would not open it")
        bits = self._granularity_bits(granularity)
        self._require_new(name, bits)
        if enabled:
            self._require_memory(bits)
        raw_name, flags = os.fsencode(name), int(BitmapFlags.AUTO) if enabled else 0
        nentries = table_entries(self._geometry.size, bits, self._geometry)
        record = BitmapRecord(0, nentries, flags, layout.BITMAP_TYPE_DIRTY, bits, len(raw_name), 0)
        self.planned.append(Planned(Bitmap(record, name, 0, b"", raw_name), None, b""))

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
        if not self._geometry.can_have_bitmaps:
            raise BitmapError("Cannot store dirty bitmaps in qcow2 v2 files")
        if any(each.bitmap.raw_name == os.fsencode(name) for each in self.planned):
            raise BitmapError(f"Bitmap already exists: {name}")
        if len(self.planned) == layout.MAX_BITMAPS:
            raise BitmapError(f"Maximum number of persistent bitmaps is already reached: {layout.MAX_BITMAPS}")
        if (bits := bits_nbytes(self._geometry.size, granularity_bits)) > layout.MAX_BITMAP_BYTES:
            raise BitmapError(f"Bitmap '{name}' would have {bits} bytes of bits, limit {layout.MAX_BITMAP_BYTES}")

    def _require_memory(self, granularity_bits: int) -> None:
        """Whether one more that records is not one too many: it would be given up at the first change."""
        records = [each.bitmap.record for each in self.planned if each.bitmap.is_enabled and not each.bitmap.is_in_use]
        grains = [*(record.granularity_bits for record in records), granularity_bits]
        if (nbytes := sum(bits_nbytes(self._geometry.size, bits) for bits in grains)) > MAX_LIVE_BYTES:
            raise BitmapError(f"bitmaps that record would have {nbytes} bytes of bits, limit {MAX_LIVE_BYTES}")

    async def remove(self, name: str) -> None:
        """Have a bitmap no more, also one that makes no sense. Raises: BitmapError."""
        self.planned.remove(self._find(name, is_used=False))

    async def clear(self, name: str) -> None:
        """Have no bit of a bitmap set. Raises: BitmapError."""
        self._find(name).bits = b""

    async def enable(self, name: str, *, on: bool) -> None:
        """Have a bitmap record from now on, or not any more. Raises: BitmapError."""
        each = self._find(name)
        if on and not each.bitmap.is_enabled:
            self._require_memory(each.bitmap.record.granularity_bits)
        flags = each.bitmap.record.flags | BitmapFlags.AUTO
        record = replace(each.bitmap.record, flags=int(flags if on else flags ^ BitmapFlags.AUTO))
        each.bitmap = replace(each.bitmap, record=record)

    async def merge(self, name: str, bits: bytes, granularity_bits: int, size: int) -> None:
        """Have set in a bitmap what is set in *bits*, of a disk of *size* bytes, too. Raises: BitmapError, OSError."""
        each = self._find(name)
        if size != self._geometry.size:
            sizes = f"(destination size is {self._geometry.size}, source size is {size})"
            raise BitmapError(f"Bitmaps are of different sizes {sizes} and can't be merged")
        wanted = bytearray(await self._bits(each))
        for start, end in set_runs(bits):
            first = start << granularity_bits >> each.bitmap.record.granularity_bits
            last = min(end << granularity_bits, size) - 1 >> each.bitmap.record.granularity_bits
            set_bits(wanted, first, last)
        each.bits = bytes(wanted)

    async def merge_own(self, name: str, source: str) -> None:
        """Have set in a bitmap what the bitmap *source* of this image has set, too. Raises: BitmapError, OSError."""
        each = self._find(source, is_changed=False)
        await self.merge(name, await self._bits(each), each.bitmap.record.granularity_bits, self._geometry.size)

    async def copy(self, bitmap: Bitmap, bits: bytes, size: int) -> None:
        """Have one like *bitmap* of a disk of *size* bytes, with its *bits*. Raises: BitmapError."""
        name, granularity_bits = os.fsdecode(bitmap.raw_name), bitmap.record.granularity_bits
        await self.add(name, 1 << granularity_bits, enabled=bitmap.is_enabled)
        await self.merge(name, bits, granularity_bits, size)

    async def _bits(self, each: Planned) -> bytes:
        if each.bits is None:
            assert each.stored is not None
            return await self._bitmaps.read_bits(each.stored)
        return each.bits.ljust(bits_nbytes(self._geometry.size, each.bitmap.record.granularity_bits), b"\0")

    def replace_bits(self, raw_name: bytes, bits: bytes) -> None:
        """Have exactly *bits* set in a bitmap that is frozen, which there is."""
        (each,) = (each for each in self.planned if each.bitmap.raw_name == raw_name)
        each.bits = bits
