"""The bitmaps of an image as its file holds them: directory, tables, and the clusters with their bits."""

import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from qcow2.driver.operation import File, Read, Size
from qcow2.error import CorruptImage
from qcow2.format import layout
from qcow2.format.bitmap import Bitmap, bitmap_directory, bits_nbytes, problem_of, read_bitmaps
from qcow2.format.geometry import Geometry
from qcow2.format.header import Header
from qcow2.format.layout import ENTRY_SIZE, BitmapRecord
from qcow2.plane.dirtybits import MAX_LIVE_BYTES
from qcow2.plane.entry import words_of

PIECE = 4096  # bytes of bits that are changed or counted at a time: those of a large disk are no number
FULL, NONE = b"\xff" * PIECE, bytes(PIECE)


@dataclass(slots=True, eq=False)
class StoredBitmap:
    """One bitmap of the directory, with its table as far as that makes sense."""

    bitmap: Bitmap
    table: "array[int]" = field(default_factory=lambda: array("Q"))  # changed together with the one in the file
    problem: str = ""  # why nobody can record in it, nor tell what it holds

    @property
    def is_kept(self) -> bool:
        """Whether every change of the disk has to be recorded in it."""
        return self.bitmap.is_enabled and not self.bitmap.is_in_use

    @property
    def is_usable(self) -> bool:
        """Whether what it says can be relied on."""
        return not self.bitmap.is_in_use and not self.problem

    def set_record(self, **fields: int) -> None:
        """The *fields* of its directory entry are others now."""
        self.bitmap = replace(self.bitmap, record=replace(self.bitmap.record, **fields))

    def nbytes(self, size: int) -> int:
        """Bytes of its bits for a disk of *size* bytes."""
        return bits_nbytes(size, self.bitmap.record.granularity_bits)

    def table_clusters(self, geometry: Geometry) -> range:
        """The clusters of its table, if that makes sense."""
        start = self.bitmap.record.table_offset
        end = start + len(self.table) * ENTRY_SIZE
        return range(start >> geometry.cluster_bits, geometry.clusters(end)) if self.table else range(0)

    def clusters(self, geometry: Geometry) -> list[int]:
        """The clusters of its table and its bits, if the table makes sense; else they leak."""
        return [*self.table_clusters(geometry), *(offset >> geometry.cluster_bits for offset in self.data_clusters())]

    def data_clusters(self) -> Iterator[int]:
        """Host offsets of the clusters with its bits."""
        return (entry & layout.BITMAP_ENTRY_OFFSET_MASK for entry in self.table if entry > layout.BITMAP_ENTRY_ALL_ONES)


async def load_bitmaps(
    file: File, header: Header, geometry: Geometry, is_metadata: Callable[[int], bool]
) -> tuple[list[StoredBitmap], "array[int]"]:
    """The bitmaps of the image, and the sorted numbers of the clusters that hold them.

    *is_metadata* says of a cluster whether other tables are in it.
    Raises: CorruptImage if the directory cannot be read.
    """
    directory = bitmap_directory(file, header)
    if directory is None or not directory.nb_bitmaps:
        return [], array("Q")
    taken = _Taken(file, geometry, geometry.round_up(await Size(file)), is_metadata)
    if problem := taken.take(directory.directory_offset, directory.directory_size):
        raise CorruptImage(file.path, directory.directory_offset, f"the bitmap directory {problem}")
    stored = [StoredBitmap(bitmap) for bitmap in await read_bitmaps(file, directory)]
    room = MAX_LIVE_BYTES
    for each in stored:
        each.problem = problem_of(each.bitmap, geometry) or await taken.take_bitmap(each)
        if each.is_kept and not each.problem:
            room -= each.nbytes(geometry.size)
            if room < 0:
                each.problem = f"is one of those with more than {MAX_LIVE_BYTES} bytes of bits together"
    return stored, array("Q", sorted(taken.clusters))


class _Taken:
    """The clusters of bitmaps, none of them twice."""

    def __init__(self, file: File, geometry: Geometry, file_end: int, is_metadata: Callable[[int], bool]) -> None:
        self.clusters: set[int] = set()
        self._file = file
        self._geometry = geometry
        self._file_end = file_end
        self._is_metadata = is_metadata
        self._room = layout.MAX_BITMAP_TABLE_BYTES

    def take(self, host_offset: int, nbytes: int) -> str:
        """Why these bytes cannot be a part of a bitmap; empty: they are."""
        if host_offset % self._geometry.cluster_size or not host_offset:
            return f"cannot lie at {host_offset:#x}"
        if host_offset + nbytes > self._file_end:
            return f"at {host_offset:#x} ends past the end of the file"
        for cluster in (wanted := self._clusters(host_offset, nbytes)):
            if cluster in self.clusters or self._is_metadata(cluster):
                return f"shares cluster {cluster << self._geometry.cluster_bits:#x} with other metadata"
        self.clusters.update(wanted)
        return ""

    def _clusters(self, host_offset: int, nbytes: int) -> range:
        return range(host_offset >> self._geometry.cluster_bits, self._geometry.clusters(host_offset + nbytes))

    async def take_bitmap(self, stored: StoredBitmap) -> str:
        """Read the table of a bitmap; why it makes no sense."""
        record: BitmapRecord = stored.bitmap.record
        nbytes = record.table_size * ENTRY_SIZE
        if nbytes > self._room:
            return f"is one of those with more than {layout.MAX_BITMAP_TABLE_BYTES} bytes of tables together"
        self._room -= nbytes
        if problem := self.take(record.table_offset, nbytes):
            return f"has a table that {problem}"
        table = words_of(await Read(self._file, record.table_offset, nbytes))
        for index, entry in enumerate(table):
            offset = entry & layout.BITMAP_ENTRY_OFFSET_MASK
            if entry & layout.BITMAP_ENTRY_RESERVED or (offset and entry & layout.BITMAP_ENTRY_ALL_ONES):
                return f"has a table whose entry {index} is {entry:#018x}"
            if offset and (problem := self.take(offset, self._geometry.cluster_size)):
                return f"has bits that {problem}"
        stored.table = table
        return ""


async def stored_bits(file: File, geometry: Geometry, each: StoredBitmap) -> bytes:
    """The bits of a bitmap as the file holds them."""
    content = bytearray(each.nbytes(geometry.size))
    view: Any = memoryview(content)
    for index, entry in enumerate(each.table):
        start = index << geometry.cluster_bits
        nbytes = min(geometry.cluster_size, len(content) - start)
        if entry == layout.BITMAP_ENTRY_ALL_ONES:
            view[start : start + nbytes] = b"\xff" * nbytes
        elif entry:
            view[start : start + nbytes] = await Read(file, entry, nbytes)
    trim(content, geometry.size, each.bitmap.record.granularity_bits)
    return bytes(content)


def trim(content: bytearray, size: int, granularity_bits: int) -> None:
    """Clear the bits past the end of the disk."""
    nbits = -(-size >> granularity_bits)
    if nbits % 8:
        content[-1] &= (1 << nbits % 8) - 1


def set_runs(bits: bytes) -> Iterator[tuple[int, int]]:
    """Where bits are set: (first, end) of each run, in order."""
    start = end = 0  # of the run that may go on
    for found in re.finditer(rb"\xff+|[^\0\xff]", bits):
        at, byte = found.start() * 8, found[0][0]
        pieces = (
            [(at, found.end() * 8)]
            if byte == 0xFF
            else [(at + bit, at + bit + 1) for bit in range(8) if byte >> bit & 1]
        )
        for first, stop in pieces:
            if first != end:
                if end > start:
                    yield start, end
                start = first
            end = stop
    if end > start:
        yield start, end


def dirty_bytes(bits: bytes, granularity_bits: int, size: int) -> int:
    """How much of a disk of *size* bytes the bits report."""
    last = size - 1 >> granularity_bits
    past_end = (last + 1 << granularity_bits) - size if bits and bits[last >> 3] >> (last & 7) & 1 else 0
    return (count_bits(bits) << granularity_bits) - past_end


def count_bits(bits: bytes | bytearray) -> int:
    """How many are set."""
    pieces = (bits[at : at + PIECE] for at in range(0, len(bits), PIECE))
    return sum(8 * PIECE if piece == FULL else int.from_bytes(piece, "little").bit_count() for piece in pieces)


def set_bits(bits: bytearray, first: int, last: int) -> None:
    """Set the bits from *first* to *last*."""
    change_bits(bits, first, last + 1, are_set=True)


def change_bits(bits: bytearray, first: int, end: int, *, are_set: bool) -> None:
    """Set, or clear, the bits from *first* to before *end*; who reads them meanwhile has the memory still."""
    while end - first > 8 * PIECE:
        stop = (first // 8 + PIECE) * 8
        _change_piece(bits, first, stop, are_set=are_set)
        first = stop
    _change_piece(bits, first, end, are_set=are_set)


def _change_piece(bits: bytearray, first: int, end: int, *, are_set: bool) -> None:
    start, stop = first // 8, -(-end // 8)
    there = memoryview(bits)[start:stop]
    if end - first == 8 * PIECE and first % 8 == 0:
        there[:] = FULL if are_set else NONE
        return
    mask = ((1 << end - first) - 1) << first % 8
    old = int.from_bytes(there, "little")
    there[:] = (old | mask if are_set else old & ~mask).to_bytes(stop - start, "little")
