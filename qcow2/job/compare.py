"""Compare two disks: what differs first, in content or, if asked, in what each image says of the range.

Windows of both disks are compared side by side; what is lowest counts, a difference or a failed read. Stretches that
both disks have as they are in two files make a window together: each step of one costs the same, however much it looks
at.
"""

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, NamedTuple

from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.operation import Compute, Equal
from qcow2.error import ImageError
from qcow2.job.content import equal_bytes, zero_bytes
from qcow2.job.crew import Buffers, Crew
from qcow2.job.pace import Pace
from qcow2.job.source import Piece, in_one_piece
from qcow2.node.extent import Extent, find_extent
from qcow2.node.node import Node

WINDOW = 2 << 20  # bytes compared at a time, of each disk
MAX_PAIRS = 64  # of a window
WIDTH = 4  # windows at a time


class Pair(NamedTuple):
    """A stretch that each disk has in one piece of a file."""

    guest_offset: int
    nbytes: int
    one: Piece
    other: Piece

    def is_beside(self, pair: "Pair") -> bool:
        """Whether it is in the same two files."""
        return self.one.file is pair.one.file and self.other.file is pair.other.file


class Found(Enum):
    """What differs."""

    CONTENT = "content"
    STATUS = "block status"


@dataclass(frozen=True, slots=True)
class Difference:
    """The first one."""

    found: Found
    guest_offset: int  # of a sector, where the content differs


class ReadFailed(Exception):
    """The bytes at *guest_offset* of *image* cannot be read; the cause says why."""

    def __init__(self, image: Node, guest_offset: int) -> None:
        super().__init__(image.file.path, guest_offset)
        self.path = image.file.path
        self.guest_offset = guest_offset


async def compare(one: Node, other: Node, pace: Pace, *, is_strict: bool = False) -> Difference | None:
    """The first difference; what one disk has more than the other must be zeros.

    *is_strict* compares the kinds of extents, too, and stops at the end of the shorter disk.
    Raises: ReadFailed, OSError or ImageError of what comes before the first difference.
    """
    return await _Comparison(one, other, pace, is_strict=is_strict).run()


class _Comparison:
    def __init__(self, one: Node, other: Node, pace: Pace, *, is_strict: bool) -> None:
        self._images = (one, other)
        self._pace = pace
        self._is_strict = is_strict
        self._crew = Crew(WIDTH)
        self._first: Difference | ReadFailed | None = None
        self._buffers = Buffers(WINDOW)
        self._gathered: list[Pair] = []  # for the next window in two files
        self._ngathered = 0  # bytes

    async def run(self) -> Difference | None:
        try:
            await self._walk_both()
        except (OSError, ImageError):  # of what lies behind all windows
            await self._end()
            if self._first is None:
                raise
        await self._end()
        if isinstance(self._first, ReadFailed):
            raise self._first
        return self._first

    async def _end(self) -> None:
        """Return when all windows have ended."""
        await self._begin_gathered()
        await self._crew.join()

    async def _walk_both(self) -> None:
        sizes = [image.size for image in self._images]
        end = min(sizes)
        total = end if self._is_strict else max(sizes)
        self._pace.begin(total)
        await self._walk(end)
        if self._first is None and total > end:
            await self._walk_tail(self._images[sizes.index(total)], end, total)

    async def _walk(self, end: int) -> None:
        offset = 0
        extents: list[Extent | None] = [None, None]  # of each image the one that *offset* is in
        while offset < end and self._first is None:
            self._pace.require_going()
            for index, image in enumerate(self._images):
                extent = extents[index]
                if extent is None or extent.guest_offset + extent.nbytes <= offset:
                    extents[index] = await find_extent(image, offset, end - offset)
            one, other = extents
            assert one is not None
            assert other is not None
            stop = min(one.guest_offset + one.nbytes, other.guest_offset + other.nbytes)
            if self._is_strict and self._status(0, one) != self._status(1, other):
                self._note(Difference(Found.STATUS, offset))
            elif one.is_zero and other.is_zero:
                self._pace.advance(stop - offset)
            else:
                stop = min(stop, offset + WINDOW)
                await self._begin(offset, stop - offset, one, other)
            offset = stop

    async def _walk_tail(self, image: Node, offset: int, end: int) -> None:
        while offset < end and self._first is None:
            self._pace.require_going()
            extent = await find_extent(image, offset, end - offset)
            nbytes = extent.nbytes
            if extent.is_zero:
                self._pace.advance(nbytes)
            else:
                nbytes = min(nbytes, WINDOW)
                await self._start(self._compare_with_zeros(image, offset, nbytes))
            offset += nbytes

    def _status(self, index: int, extent: Extent) -> tuple[bool, ...]:
        """What strict comparison compares: as with QEMU, zeros past the end of a backing file are the overlay's own."""
        is_allocated = extent.is_present or self._images[index].chain[extent.depth].backing is not None
        has_place = extent.host_offset is not None
        return is_allocated, extent.is_zero, extent.is_data, has_place, extent.is_compressed

    async def _begin(self, offset: int, nbytes: int, one: Extent, other: Extent) -> None:
        """Have the range compared, now or with the next ones."""
        if one.is_zero or other.is_zero:
            await self._start(self._compare_with_zeros(self._images[one.is_zero], offset, nbytes))
            return
        pieces = [await in_one_piece(image, offset, nbytes) for image in self._images]
        if pieces[0] is None or pieces[1] is None:
            await self._start(self._compare(offset, nbytes))
            return
        pair = Pair(offset, nbytes, pieces[0], pieces[1])
        if self._gathered and not pair.is_beside(self._gathered[0]):
            await self._begin_gathered()
        self._gathered.append(pair)
        self._ngathered += nbytes
        if self._ngathered >= WINDOW or len(self._gathered) == MAX_PAIRS:
            await self._begin_gathered()

    async def _start(self, window: Coroutine[Any, Any, None]) -> None:
        await self._crew.start(self._noting_failure(window))

    async def _noting_failure(self, window: Coroutine[Any, Any, None]) -> None:
        try:
            await window
        except ReadFailed as failure:
            self._note(failure)

    async def _begin_gathered(self) -> None:
        gathered, self._gathered, self._ngathered = self._gathered, [], 0
        if gathered:
            await self._start(self._compare_in_files(gathered))

    async def _compare_in_files(self, pairs: list[Pair]) -> None:
        scratch = self._buffers.take()
        stretches = [(pair.one.host_offset, pair.other.host_offset, pair.nbytes) for pair in pairs]
        try:
            nequal = await Equal(pairs[0].one.file, pairs[0].other.file, stretches, scratch)
        except OSError:  # of which of them, and where, shows when they are read one after the other
            for pair in pairs:
                await self._compare(pair.guest_offset, pair.nbytes)
            return
        for pair in pairs:
            self._judge(pair.guest_offset, pair.nbytes, min(nequal, pair.nbytes))
            if nequal < pair.nbytes:
                break
            nequal -= pair.nbytes
        self._buffers.give(scratch)

    async def _compare(self, offset: int, nbytes: int) -> None:
        pair = self._buffers.take(), self._buffers.take()
        self._judge(
            offset, nbytes, await self._look(offset, self._images, [buffer[:nbytes] for buffer in pair], equal_bytes)
        )
        for buffer in pair:
            self._buffers.give(buffer)

    async def _compare_with_zeros(self, image: Node, offset: int, nbytes: int) -> None:
        buffer = self._buffers.take()
        self._judge(offset, nbytes, await self._look(offset, [image], [buffer[:nbytes]], zero_bytes))
        self._buffers.give(buffer)

    async def _look(
        self, offset: int, images: Sequence[Node], views: Sequence[memoryview], function: Callable[..., int]
    ) -> int:
        """What *function* says of the *views*, once they hold what the *images* have from *offset* on."""
        for image, view in zip(images, views, strict=True):
            await self._read(image, offset, view)
        found: int = await Compute(partial(function, *views))
        return found

    async def _read(self, image: Node, offset: int, target: memoryview) -> None:
        try:
            await image.read(offset, MemoryBuffer(target))
        except (OSError, ImageError) as error:
            raise ReadFailed(image, offset) from error

    def _judge(self, offset: int, nbytes: int, nequal: int) -> None:
        self._pace.advance(nbytes)
        if nequal < nbytes:
            self._note(Difference(Found.CONTENT, offset + nequal))

    def _note(self, found: Difference | ReadFailed) -> None:
        if self._first is None or found.guest_offset < self._first.guest_offset:
            self._first = found
