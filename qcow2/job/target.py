"""What a copy writes to. A target that nobody finished must not pass for a whole disk: its first bytes come last."""

from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, Protocol

from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.operation import CopyRange, File, Resize, Sync, Write
from qcow2.engine.compressed import level_of
from qcow2.engine.create import Options, header_of, plan, write_tables
from qcow2.engine.image import Image
from qcow2.format import layout
from qcow2.format.header import Header
from qcow2.format.layout import SECTOR_SIZE
from qcow2.job.source import Piece
from qcow2.node.node import Node

LastStep = Callable[[Image], Coroutine[Any, Any, None]]  # with the image that holds all of the disk
Runs = list[tuple[int, int]]  # (start, end) in a buffer, of what is not zeros
Spots = list[tuple[int, int, Piece]]  # (start, end) of a part of a run, and its place in a file
MAGIC = layout.MAGIC.to_bytes(4, "big")
FIRST_BYTES = 64 << 10  # partition table, boot sector, superblock: without them nobody takes it for a disk


class Target(Protocol):
    """Is written once, in ranges that begin and end at a multiple of *unit*, or at the end of the disk."""

    unit: int
    plain: "Plain | None"  # itself, if what is not zeros goes to a file as it is, and `put` does nothing else
    last_step: LastStep | None  # of `finish`: a new image is none before

    async def begin(self) -> None:
        """Make sure that nobody takes it for whole from now on."""

    async def pack(self, data: memoryview, runs: Runs) -> object:
        """What *data* is in the file, if that takes thinking about."""

    def place(self, offset: int, nbytes: int, runs: Runs, packed: object) -> object:
        """Decide where these *nbytes* go, without a wait: the order of these calls is the order in the file."""

    async def put(self, offset: int, data: memoryview, runs: Runs, place: object) -> None:
        """Write *data*, of which only *runs* are not zeros, at the *place* decided on."""

    def straight(self, offset: int) -> Piece | None:
        """Where what is at *offset* goes as it is, whatever it holds, if zeros may be left out there."""

    async def take(self, offset: int, nbytes: int, place: object, there: Piece) -> bool:
        """Have the host copy what is *there* to the *place* decided on; false: it cannot, `put` has to."""

    async def zero(self, offset: int, nbytes: int) -> None:
        """Let this range read as zeros."""

    async def advance(self, offset: int) -> None:
        """Nothing below *offset* comes any more, and nothing of it is under way."""

    async def finish(self) -> None:
        """All has been written: make it whole, and stable."""


class Plain(Protocol):
    """What more can be said of a target to whose file data goes as it is."""

    def spots(self, offset: int, runs: Runs, place: object) -> Spots:
        """Where *runs* of what is at *offset* go."""

    def settle(self, offset: int, runs: Runs, place: object) -> None:
        """Of what was placed as if all of it were data only *runs* are; the rest is zeros."""


class InPlace:
    """A disk that is there: a raw file, a block device, an image that is written to as its guest would."""

    def __init__(self, image: Node, size: int, *, is_zero: bool, length: int | None = None) -> None:
        """*size* bytes of it are written; what is behind them stays.

        *is_zero*: all of it reads as zeros now; *length*: which the file gets at the end.
        """
        self.unit = SECTOR_SIZE
        self.plain: Plain | None = None
        self.last_step: LastStep | None = None
        self._image = image
        self._size = size
        self._is_zero = is_zero
        self._length = length
        self._first = bytearray(FIRST_BYTES)  # written last
        self._put_first: Runs = []  # of them

    async def begin(self) -> None:
        """Take away the first bytes of what was there."""
        if not self._is_zero:
            await self._image.write_zeroes(0, min(len(self._first), self._size), unmap=True)
            await self._image.flush()

    async def pack(self, data: memoryview, runs: Runs) -> None:
        """As it is."""

    def place(self, offset: int, nbytes: int, runs: Runs, packed: object) -> None:
        """At *offset*."""

    async def put(self, offset: int, data: memoryview, runs: Runs, place: object) -> None:
        """All but what has to wait."""
        stop = 0
        for start, end in runs:
            await self._fill(offset + stop, start - stop)
            await self._write(offset + start, data[start:end])
            stop = end
        await self._fill(offset + stop, len(data) - stop)

    def straight(self, offset: int) -> Piece | None:
        """In a raw file that is empty, behind what has to wait."""
        if self._length is None or not self._is_zero or offset < len(self._first):
            return None
        return Piece(self._image.file, offset)

    async def take(self, offset: int, nbytes: int, place: object, there: Piece) -> bool:
        """If it is a raw file, and none of this has to wait."""
        if self._length is None or offset < len(self._first):
            return False
        could: bool = await CopyRange(there.file, there.host_offset, self._image.file, offset, nbytes)
        return could

    async def zero(self, offset: int, nbytes: int) -> None:
        """If it may be anything else."""
        await self._fill(offset, nbytes)

    async def _fill(self, offset: int, nbytes: int) -> None:
        if nbytes and not self._is_zero:
            await self._image.write_zeroes(offset, nbytes, unmap=True)

    async def _write(self, offset: int, data: memoryview) -> None:
        if offset < len(self._first):
            nwaiting = min(len(data), len(self._first) - offset)
            self._put_first.append((offset, offset + nwaiting))
            self._first[offset : offset + nwaiting] = data[:nwaiting]
            offset += nwaiting
            data = data[nwaiting:]
        if data:
            await self._store(offset, data)

    async def _store(self, offset: int, data: memoryview) -> None:
        await self._image.write(offset, MemoryBuffer(data))

    async def advance(self, offset: int) -> None:
        """Nothing waits but the first bytes."""

    async def finish(self) -> None:
        """The first bytes, once all others are stable."""
        if self._length is not None:
            await Resize(self._image.file, self._length)
        await self._image.flush()
        for start, end in self._put_first:
            await self._store(start, memoryview(self._first)[start:end])
        await self._image.flush()
        if self.last_step is not None:
            assert isinstance(self._image, Image)
            await self.last_step(self._image)


class Over(InPlace):
    """A disk that goes on being one: what is put changes it, and nothing else."""

    def __init__(self, image: Node, size: int) -> None:
        super().__init__(image, size, is_zero=False)
        self._first = bytearray()


async def create_all_but_magic(file: File, options: Options) -> Header:
    """Make of whatever *file* holds what is a new image, as the header says, once MAGIC is written. Stable on return.

    -> its header without the magic: who opens it by that does not write it, whatever of the header changes.
    Raises: ValueError or UnsupportedImage before the file is touched.
    """
    whole = plan(options)
    await write_tables(file, whole)
    header, packed = header_of(file, whole)
    await Write(file, len(MAGIC), packed[len(MAGIC) : SECTOR_SIZE])
    await Sync(file)
    return without_magic(header)


def without_magic(header: Header) -> Header:
    """The same of what is no image yet."""
    return replace(header, record=replace(header.record, magic=0))


class InNew(InPlace):
    """A new image in *file* that is none until it holds all of the disk: its magic comes last."""

    def __init__(self, file: File, image: Node, size: int, *, is_zero: bool, magic: bytes = MAGIC) -> None:
        """*image* is open, without its *magic*, and closed when the disk is in it."""
        super().__init__(image, size, is_zero=is_zero)
        self._file = file
        self._first = bytearray()  # of the disk: none has to wait
        self._magic = magic

    async def begin(self) -> None:
        """It has no magic."""

    async def finish(self) -> None:
        """Close the image; once that is stable, make it one."""
        await super().finish()
        await self._image.close()
        await Sync(self._file)
        await Write(self._file, 0, self._magic)
        await Sync(self._file)


class CompressedInPlace(InPlace):
    """A qcow2 image that is there, written to in compressed clusters: those that hold anything."""

    def __init__(self, image: Image, size: int, level: int | None = None, *, is_zero: bool) -> None:
        """As of a disk that is there. Raises: UnsupportedImage if *image* can have none; ValueError for the *level*."""
        super().__init__(image, size, is_zero=is_zero)
        image.require_compressible()
        self.unit = image.geometry.cluster_size
        self._qcow2 = image
        self._level = level_of(image.header.compression_type, level)
        self._first = bytearray(max(FIRST_BYTES, self.unit))

    async def put(self, offset: int, data: memoryview, runs: Runs, place: object) -> None:
        """Whole clusters of what holds anything."""
        whole: Runs = []
        for start, end in runs:
            low, high = start - start % self.unit, min(end + -end % self.unit, len(data))
            if whole and low <= whole[-1][1]:
                low = whole.pop()[0]
            whole.append((low, high))
        await super().put(offset, data, whole, place)

    async def _store(self, offset: int, data: memoryview) -> None:
        """The last cluster of a source that is shorter is as in any image."""
        end = offset + len(data)
        whole = len(data) if end == self._qcow2.size else len(data) - end % self.unit
        if whole:
            await self._qcow2.write_compressed(offset, data[:whole], self._level)
        if whole < len(data):
            await self._qcow2.write(offset + whole, MemoryBuffer(data[whole:]))
