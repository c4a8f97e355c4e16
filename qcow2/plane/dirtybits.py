"""Live bits: what the bitmaps that record know, in memory that may outlive the process; and how they lie there."""

import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from qcow2.native import ffi, lib

MAGIC = b"qcow2BIT"
HEADER = struct.Struct("<8sII")  # magic, how many bitmaps, checksum of the entries
ENTRY = struct.Struct("<QQII")  # table offset, bytes of bits, granularity_bits, 0: the bitmap of the image that it is
NONE = bytes(len(MAGIC))  # in place of the magic: there are no live bits
MIN_ZONE_BITS, MAX_ZONES = 22, 1 << 16
MAX_LIVE_BYTES = 1 << 30  # of all bits of an image


class Shape(NamedTuple):
    """Which bitmap of the image some bits belong to."""

    table_offset: int
    nbytes: int
    granularity_bits: int


class LiveBits(NamedTuple):
    """What a process left of the bits of its bitmaps."""

    bits: dict[Shape, bytes]


def pack_live(shapes: Sequence[Shape]) -> bytes:
    """What comes before the bits of these bitmaps, which follow in their order, each at a multiple of 8."""
    entries = b"".join(ENTRY.pack(*shape, 0) for shape in shapes)
    return HEADER.pack(MAGIC, len(shapes), zlib.crc32(entries)) + entries


def places(shapes: Iterable[Shape], start: int) -> list[int]:
    """Where the bits of each bitmap begin, the first at *start*; and where they end."""
    found = [start]
    for shape in shapes:
        found.append(found[-1] + shape.nbytes + -shape.nbytes % 8)
    return found


def parse_live(content: bytes | memoryview) -> LiveBits | None:
    """The live bits at the start of *content*; None if there are none."""
    if len(content) < HEADER.size:
        return None
    magic, count, checksum = HEADER.unpack_from(content)
    end = HEADER.size + count * ENTRY.size
    if magic != MAGIC or end > len(content) or zlib.crc32(content[HEADER.size : end]) != checksum:
        return None
    shapes = [Shape(*entry[:3]) for entry in ENTRY.iter_unpack(content[HEADER.size : end])]
    found = dict(zip(shapes, places(shapes, end), strict=False))
    if any(at + shape.nbytes > len(content) for shape, at in found.items()):
        return None
    return LiveBits({shape: bytes(content[at : at + shape.nbytes]) for shape, at in found.items()})


def zone_bits(size: int) -> int:
    """log2 of the bytes of a zone of a disk of *size* bytes: 4 MiB, unless that makes too many."""
    bits = MIN_ZONE_BITS
    while size >> bits > MAX_ZONES:
        bits += 1
    return bits


class DirtyBits:
    """Owner of a struct dirty_bits and of what it borrows; at first every zone is cold."""

    def __init__(self) -> None:
        self.native: Any = ffi.new("struct dirty_bits *")
        self._zones: Any = None
        self._bitmaps: Any = None
        self._bits: list[Any] = []

    def begin(self, size: int) -> None:
        """Have cold zones for a disk of *size* bytes, whose changes are to be noted in no bitmap yet."""
        self.end()
        self.native.zone_bits = zone_bits(size)
        nzones = -(-size >> zone_bits(size))
        self._zones = ffi.new("uint8_t[]", nzones)
        self.native.zones, self.native.nmarks = self._zones, 0
        self.native.nzones = nzones

    def record(self, granularities: Sequence[int], bits: list[Any]) -> None:
        """Note changes in *bits* from now on, cffi pointers to the bits of each bitmap."""
        bitmaps = ffi.new("struct live_bitmap[]", len(bits))
        for bitmap, granularity_bits, place in zip(bitmaps, granularities, bits, strict=True):
            bitmap.bits, bitmap.granularity_bits = place, granularity_bits
        self.native.bitmaps, self.native.nbitmaps = bitmaps, len(bits)
        self._bitmaps, self._bits = bitmaps, bits

    def end(self) -> None:
        """Every zone is cold, and the bits are given back."""
        self.native.nzones = self.native.nbitmaps = 0
        self._bits = []

    def set(self, guest_offset: int, nbytes: int) -> bool:
        """Note that the bytes change; False, and nothing is noted, if one of their zones is cold."""
        return lib.dirty_bits_set(self.native, guest_offset, nbytes) == 0

    def zones_of(self, guest_offset: int, nbytes: int) -> range:
        """The zones that the bytes are in."""
        bits = int(self.native.zone_bits)
        return range(guest_offset >> bits, (guest_offset + nbytes - 1 >> bits) + 1)

    def bits_of(self, zone: int, granularity_bits: int, size: int) -> tuple[int, int]:
        """The first and the last bit of a bitmap that *zone* touches."""
        shift = int(self.native.zone_bits)
        end = min(zone + 1 << shift, size)
        return zone << shift >> granularity_bits, end - 1 >> granularity_bits

    def heat(self, zones: Iterable[int]) -> None:
        """From now on the extent map may change the *zones*."""
        for zone in zones:
            self._zones[zone] = lib.ZONE_USED

    def cool(self, zones: Iterable[int]) -> None:
        """From now on it may not."""
        for zone in zones:
            self._zones[zone] = lib.ZONE_COLD

    def take_idle(self, zones: Iterable[int]) -> list[int]:
        """Those of the hot *zones* in which nothing has changed since this was asked last."""
        idle = []
        for zone in zones:
            if self._zones[zone] == lib.ZONE_HOT:
                idle.append(zone)
            self._zones[zone] = lib.ZONE_HOT
        self.native.nmarks = 0
        return idle

    @property
    def marks(self) -> int:
        """How many changes were noted since `take_idle` was asked last."""
        return int(self.native.nmarks)

    def load(self, index: int, start: int, nbytes: int) -> bytearray:
        """These bytes of the bits of the bitmap number *index*."""
        return bytearray(ffi.buffer(self._bits[index] + start, nbytes))
