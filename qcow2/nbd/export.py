"""A disk as NBD clients see it: what it can do, its bytes, and what is known about them."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import NamedTuple, Protocol

from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.file import HostFile
from qcow2.driver.shared import SharedDriver
from qcow2.engine.bitmaptable import StoredBitmap, set_runs
from qcow2.engine.image import Image
from qcow2.error import BitmapError, UnsupportedImage
from qcow2.format.layout import SECTOR_SIZE
from qcow2.nbd.wire import Allocation, Transmission
from qcow2.node.extent import Extent, find_extent
from qcow2.node.node import Node

PREFERRED_BLOCK = 4096
MAX_REQUEST = 32 << 20  # bytes that a READ or WRITE may have
MAX_EXTENTS = 2048  # of one answer to BLOCK_STATUS
MAX_LOOKS = 2 * MAX_EXTENTS  # at the mapping, for one answer: all others wait meanwhile
DIRTY = 1  # the one flag of `qemu:dirty-bitmap:NAME`


class Cache(Enum):
    """When writes become stable."""

    WRITEBACK = "writeback"  # when the client asks
    WRITETHROUGH = "writethrough"  # before they are answered
    UNSAFE = "unsafe"  # when the image is closed


@dataclass(frozen=True, slots=True)
class Terms:
    """How a disk is offered."""

    name: str = ""
    description: str = ""
    is_shared: bool = False  # with more than one client at a time
    cache: Cache = Cache.WRITEBACK
    bitmaps: tuple[str, ...] = ()  # whose bits clients may ask for
    tells_depth: bool = False  # which file of the chain has what


class Piece(NamedTuple):
    """A stretch of what a client reads."""

    nbytes: int
    is_zero: bool
    file: HostFile | None = None  # which it can be sent from as it is, at `host_offset`
    host_offset: int = 0

    def is_at_hand(self) -> bool:
        """Whether its ends are in the page cache, so that it probably is; where the host cannot tell it is not."""
        if self.file is None:
            return False
        try:
            for host_offset in (self.host_offset, self.host_offset + self.nbytes - 1):
                os.preadv(self.file.fd, [bytearray(1)], host_offset, os.RWF_NOWAIT)
        except OSError:
            return False
        return True


class Context(Protocol):
    """Something that BLOCK_STATUS tells about each byte of the disk."""

    name: bytes

    def statuses(self, offset: int, nbytes: int, limit: int) -> list[tuple[int, int]]:
        """Length and flags of each stretch from *offset* on, within *nbytes*, of the first *limit* or fewer."""


class Export:
    """*node*, run by *driver*, offered on *terms*; for any number of threads. It stays the caller's to close.

    Raises: BitmapError, UnsupportedImage, OSError if a bitmap cannot be told.
    """

    def __init__(self, node: Node, driver: SharedDriver, terms: Terms) -> None:
        self.name = os.fsencode(terms.name)
        self.description = os.fsencode(terms.description)
        self._node = node
        self._driver = driver
        self._terms = terms
        self.contexts: list[Context] = [_Extents(b"base:allocation", _allocation, node, driver)]
        if terms.tells_depth:
            self.contexts.append(_Extents(b"qemu:allocation-depth", _depth, node, driver))
        self.contexts += [_bitmap_of(node, driver, name) for name in terms.bitmaps]
        self._sendable = _sendable_files(node) if node.read_only else set()

    @property
    def size(self) -> int:
        """Length of the disk in bytes."""
        return self._node.size

    @property
    def read_only(self) -> bool:
        """Whether nobody may write."""
        return self._node.read_only

    @property
    def min_block(self) -> int:
        """What requests should be a multiple of; others are served, too."""
        return SECTOR_SIZE if self._node.is_encrypted else 1

    def flags(self, *, is_structured: bool) -> Transmission:
        """What a client may ask for."""
        flags = Transmission.HAS_FLAGS | Transmission.SEND_FLUSH | Transmission.SEND_FUA | Transmission.SEND_CACHE
        if self.read_only:
            flags |= Transmission.READ_ONLY
        else:
            flags |= Transmission.SEND_TRIM | Transmission.SEND_WRITE_ZEROES | Transmission.SEND_FAST_ZERO
        if is_structured:
            flags |= Transmission.SEND_DF
        if self._terms.is_shared:
            flags |= Transmission.CAN_MULTI_CONN  # all share one engine, whose flush is for all
        return flags

    def read(self, offset: int, target: memoryview) -> None:
        """Fill *target*, which lies inside the disk. Raises: OSError, ImageError."""
        self._driver.run(self._node.read(offset, MemoryBuffer(target)))

    def pieces(self, offset: int, nbytes: int) -> list[Piece]:
        """What a range inside the disk is made of, holes told apart. Raises: OSError, ImageError."""
        return self._driver.run(self._pieces(offset, nbytes))

    async def _pieces(self, offset: int, nbytes: int) -> list[Piece]:
        found: list[Piece] = []
        end = offset + nbytes
        while offset < end:
            extent = await find_extent(self._node, offset, end - offset)
            piece = self._piece_of(extent)
            if found and piece.file is None and found[-1].file is None and piece.is_zero == found[-1].is_zero:
                piece = Piece(found.pop().nbytes + piece.nbytes, piece.is_zero)
            found.append(piece)
            offset += extent.nbytes
        return found

    def _piece_of(self, extent: Extent) -> Piece:
        if extent.is_zero or extent.host_offset is None or extent.file not in self._sendable:
            return Piece(extent.nbytes, extent.is_zero)
        assert isinstance(extent.file, HostFile)
        return Piece(extent.nbytes, False, extent.file, extent.host_offset)

    def write(self, offset: int, source: memoryview) -> None:
        """Put *source*, which lies inside the disk, at *offset*; process-safe on return. Raises: as `read`."""
        self._driver.run(self._node.write(offset, MemoryBuffer(source)))

    def write_zeroes(self, offset: int, nbytes: int, *, may_unmap: bool) -> None:
        """Make the range read as zeros. Raises: OSError, ImageError."""
        self._driver.run(self._node.write_zeroes(offset, nbytes, unmap=may_unmap))

    @property
    def zeroes_fast(self) -> bool:
        """Whether `write_zeroes` changes a mapping, and does not write."""
        node = self._node
        return isinstance(node, Image) and node.header.record.version >= 3 and node.data_file is node.file

    def trim(self, offset: int, nbytes: int) -> None:
        """Give the range's space back. Raises: OSError, ImageError."""
        self._driver.run(self._node.discard(offset, nbytes))

    def flush(self) -> None:
        """Make every write that was answered stable. Raises: OSError."""
        if not self.read_only and self._terms.cache is not Cache.UNSAFE:
            self._driver.run(self._node.flush())

    @property
    def is_writethrough(self) -> bool:
        """Whether every write is flushed before it is answered."""
        return self._terms.cache is Cache.WRITETHROUGH


def _sendable_files(node: Node) -> "set[object]":
    """The files of the chain that hold the disk's bytes as they are."""
    return {
        each.data_file for each in node.chain if each.extent_map is not None and not getattr(each, "is_encrypted", True)
    }


def _allocation(extent: Extent) -> int:
    """What is a hole, and what reads as zeros."""
    return (0 if extent.is_data else Allocation.HOLE) | (Allocation.ZERO if extent.is_zero else 0)


def _depth(extent: Extent) -> int:
    """Which file of the chain tells, 1 for the image itself; 0: none does."""
    return extent.depth + 1 if extent.is_present else 0


class _Extents:
    """A context that is in the mapping: *flags* of each extent."""

    def __init__(self, name: bytes, flags: Callable[[Extent], int], node: Node, driver: SharedDriver) -> None:
        self.name = name
        self._flags = flags
        self._node = node
        self._driver = driver

    def statuses(self, offset: int, nbytes: int, limit: int) -> list[tuple[int, int]]:
        """As `Context.statuses`, of the first MAX_LOOKS runs; the one after *limit* stretches is looked at, no more."""
        return self._driver.run(self._look(offset, nbytes, limit))

    async def _look(self, offset: int, nbytes: int, limit: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        end = offset + nbytes
        for _ in range(MAX_LOOKS):
            if offset == end:
                break
            extent = await find_extent(self._node, offset, end - offset)
            flags = int(self._flags(extent))
            if found and found[-1][1] == flags:
                found[-1] = (found[-1][0] + extent.nbytes, flags)
            elif len(found) == limit:
                break
            else:
                found.append((extent.nbytes, flags))
            offset += extent.nbytes
        return found


class _DirtyBitmap:
    """`qemu:dirty-bitmap:NAME`: what has changed since the bitmap was cleared."""

    def __init__(self, name: str, granularity_bits: int, bits: Callable[[], bytes]) -> None:
        self.name = b"qemu:dirty-bitmap:" + os.fsencode(name)
        self._granularity_bits = granularity_bits
        self._bits = bits

    def statuses(self, offset: int, nbytes: int, limit: int) -> list[tuple[int, int]]:
        """As `Context.statuses`."""
        return list(islice(self._stretches(offset, nbytes), limit))

    def _stretches(self, offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
        shift, end = self._granularity_bits, offset + nbytes
        start = offset >> shift >> 3  # byte of the bits
        part = self._bits()[start : ((end - 1) >> shift >> 3) + 1]
        for first, stop in set_runs(part):
            dirty, clean = (min(max((start * 8 + bit) << shift, offset), end) for bit in (first, stop))
            if clean <= offset:
                continue
            if dirty > offset:
                yield dirty - offset, 0
            if clean > dirty:
                yield clean - dirty, DIRTY
            offset = clean
        if offset < end:
            yield end - offset, 0


def _bitmap_of(node: Node, driver: SharedDriver, name: str) -> _DirtyBitmap:
    """The context of the bitmap *name* of the image. Raises: BitmapError, UnsupportedImage, OSError."""
    if not isinstance(node, Image):
        raise UnsupportedImage(node.file.path, "only a qcow2 image has bitmaps")
    stored = _find(driver.run(node.bitmaps()), name)
    if node.read_only:
        frozen = driver.run(node.bitmap_bits(stored))
        return _DirtyBitmap(name, stored.bitmap.record.granularity_bits, lambda: frozen)
    return _DirtyBitmap(name, stored.bitmap.record.granularity_bits, lambda: driver.run(node.bitmap_bits(stored)))


def _find(stored: list[StoredBitmap], name: str) -> StoredBitmap:
    for each in stored:
        if each.bitmap.raw_name == os.fsencode(name):
            if each.bitmap.is_in_use or each.problem:
                raise BitmapError(f"Bitmap '{name}' is inconsistent and cannot be used")
            return each
    raise BitmapError(f"Dirty bitmap '{name}' not found")
