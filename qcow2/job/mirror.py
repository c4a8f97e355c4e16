"""A copy of a disk that is in use, and is kept in step with what is written to it.

Each change goes to the disk, and where the copy has come by already to the copy, too, before it is acknowledged: once
all is copied the two are the same at each moment in which no change is under way. A place that could not be copied,
or not be changed in both, is behind again, and is copied anew. A piece of the disk is held while it is copied or
changed, so the copy never gets old bytes over newer ones, nor two writes to one place in another order than the disk.
"""

from collections.abc import Awaitable, Callable
from functools import partial

from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.operation import Buffer, Compute
from qcow2.engine.rangelock import Hold, RangeLocks
from qcow2.engine.turns import Turns
from qcow2.error import ImageError, no_memory
from qcow2.job.content import SPARSE_UNIT, data_runs
from qcow2.job.crew import Buffers, Crew
from qcow2.job.pace import Pace
from qcow2.node.extent import find_extent
from qcow2.node.node import Node

CHUNK = 512 << 10  # bytes that are behind, or in step, and are copied at a time
UNIT = CHUNK // 32  # bytes that are held together
MAX_SPAN = 64 << 20  # bytes that are looked through at a time where nothing is to be copied
PIECE = 256 << 10  # bytes of a write that are copied out of the guest's memory at a time
PIECES = 64  # of these, at a time

Change = Callable[[Node], Awaitable[None]]


class Mirror:
    """Lets *target* become what *source* shows, or, of the topmost file of its chain alone, what that holds.

    `catch_up` copies; changes of the source come by `write`, `write_zeroes`, `discard` and `grow` from before that on.
    *on_behind()* is told when a place that was in step is not any more.
    """

    def __init__(self, source: Node, target: Node, *, only_top: bool, is_new: bool) -> None:
        """*is_new*: all of *target* shows what it would if nothing had been written to it."""
        self.on_behind: Callable[[], None] = lambda: None
        self._is_broken = False
        target.on_failure = self._break
        self._source = source
        self._target = target
        self._only_top = only_top
        nchunks = -(-source.size // CHUNK)
        self._behind = bytearray(b"\1" * nchunks)
        self._nbehind = nchunks  # which are too many to be counted at each step
        self._untouched = bytearray(b"\1" * nchunks if is_new and not only_top else nchunks)  # reads as zeros there
        self._trouble: OSError | ImageError | None = None  # of a change that the target did not take
        self._has_failed = False  # `catch_up` has said why, and was not begun again
        self._locks = RangeLocks()
        self._turns = Turns(PIECES)
        self._buffers = Buffers(CHUNK)

    @property
    def is_in_step(self) -> bool:
        """Whether all is copied; then the two are the same while no change is under way."""
        return not self._is_broken and self._trouble is None and self._behind.find(1) < 0

    @property
    def is_broken(self) -> bool:
        """Whether the target can never be in step again, and `catch_up` has said why."""
        return self._is_broken and self._trouble is None

    async def catch_up(self, pace: Pace, *, width: int) -> None:
        """Copy what is behind, *width* chunks at a time, until nothing is.

        After an error what the target did not take meanwhile is only copied: it may take that by now.
        Raises: what the target did not take of a change; OSError, ImageError, Cancelled.
        """
        self._tell(pace)
        if self._has_failed and not self._is_broken:
            self._trouble = None
        self._has_failed = False
        try:
            await self._catch_up(pace, width)
        except (OSError, ImageError):
            self._has_failed = True
            raise

    async def _catch_up(self, pace: Pace, width: int) -> None:
        self._raise_trouble()
        while self._behind.find(1) >= 0:
            async with Crew(width) as crew:
                await self._walk(crew, pace)
        self._raise_trouble()

    async def _walk(self, crew: Crew, pace: Pace) -> None:
        """Copy all that is behind once."""
        chunk = self._behind.find(1)
        while chunk >= 0:
            pace.require_going()
            self._raise_trouble()
            nchunks = await self._span(chunk)
            await pace.wait(CHUNK if nchunks == 1 else 0)
            await crew.start(self._bring(chunk, nchunks, pace))
            chunk = self._behind.find(1, chunk + nchunks)

    async def _span(self, chunk: int) -> int:
        """How many chunks from this one on are behind, and need not be read: one at least."""
        end = self._behind.find(0, chunk, chunk + MAX_SPAN // CHUNK)
        end = min(len(self._behind), chunk + MAX_SPAN // CHUNK) if end < 0 else end
        offset = chunk * CHUNK
        extent = await find_extent(self._source, offset, min(end * CHUNK, self._source.size) - offset)
        needs_none = extent.is_zero or (self._only_top and extent.depth > 0)
        return max(1, extent.nbytes // CHUNK) if needs_none else 1

    async def flush(self) -> None:
        """Make stable all that the target holds: it is in step, and nothing is under way. Raises: OSError."""
        assert self.is_in_step
        await self._target.flush()

    def _raise_trouble(self) -> None:
        trouble, self._trouble = self._trouble, None
        if trouble is not None:
            raise trouble

    def _tell(self, pace: Pace) -> None:
        size = self._source.size
        pace.tell(max(0, size - self._nbehind * CHUNK), size)

    def _set_behind(self, first: int, end: int, *, is_behind: bool) -> None:
        self._nbehind += is_behind * (end - first) - self._behind.count(1, first, end)
        self._behind[first:end] = bytes([is_behind]) * (end - first)

    # copying

    async def _bring(self, chunk: int, nchunks: int, pace: Pace) -> None:
        offset, end = chunk * CHUNK, min((chunk + nchunks) * CHUNK, self._source.size)
        async with self._hold(offset, end - offset):
            while offset < end:
                await pace.give_way()
                extent = await find_extent(self._source, offset, end - offset)
                if self._only_top and extent.depth > 0:
                    nbytes = extent.nbytes
                elif extent.is_zero:
                    nbytes = extent.nbytes
                    await self._clear(offset, nbytes)
                else:
                    nbytes = min(extent.nbytes, CHUNK - offset % CHUNK)
                    await self._copy(offset, nbytes)
                offset += nbytes
            self._set_behind(chunk, chunk + nchunks, is_behind=False)
        self._tell(pace)

    async def _copy(self, offset: int, nbytes: int) -> None:
        """Bytes of one chunk."""
        buffer = self._buffers.take()
        data = buffer[:nbytes]
        await self._source.read(offset, MemoryBuffer(data))
        runs = [(0, nbytes)]
        if self._untouched[offset // CHUNK]:
            runs = await Compute(partial(data_runs, data, SPARSE_UNIT))
        for start, end in runs:
            self._touch(offset + start, end - start)
            await self._target.write(offset + start, MemoryBuffer(data[start : min(end, nbytes)]))
        self._buffers.give(buffer)

    async def _clear(self, offset: int, nbytes: int) -> None:
        first, last = offset // CHUNK, (offset + nbytes - 1) // CHUNK
        if self._untouched.find(0, first, last + 1) < 0 or await self._target.reads_as_zeros(offset, nbytes):
            return
        self._touch(offset, nbytes)
        await self._target.write_zeroes(offset, nbytes, unmap=True)

    def _touch(self, offset: int, nbytes: int) -> None:
        first, last = offset // CHUNK, (offset + nbytes - 1) // CHUNK
        self._untouched[first : last + 1] = bytes(last + 1 - first)

    # changes of the source

    async def write(self, guest_offset: int, source: Buffer) -> None:
        """As of a node; the bytes are copied first, which their owner may change while they are written twice."""
        for start in range(0, len(source), PIECE):
            async with self._turns:
                piece = _copy_of(source.slice(start, min(PIECE, len(source) - start)))
                await self._write(guest_offset + start, piece)

    async def _write(self, offset: int, piece: memoryview) -> None:
        async with self._hold(offset, len(piece)):
            await self._change_source(offset, len(piece), lambda node: node.write(offset, MemoryBuffer(piece)))
            for start, end in self._in_step(offset, len(piece)):
                part = MemoryBuffer(piece[start - offset : end - offset])
                await self._change_target(start, end - start, partial(_write_to, offset=start, data=part))

    async def write_zeroes(self, guest_offset: int, nbytes: int, *, unmap: bool) -> None:
        """As of a node."""
        async with self._hold(guest_offset, nbytes):
            clear = partial(_clear_in, offset=guest_offset, nbytes=nbytes, unmap=unmap)
            await self._change_source(guest_offset, nbytes, clear)
            for start, end in self._in_step(guest_offset, nbytes):
                clear = partial(_clear_in, offset=start, nbytes=end - start, unmap=unmap)
                await self._change_target(start, end - start, clear)

    async def discard(self, guest_offset: int, nbytes: int) -> None:
        """As of a node; what goes is zeros in both, to the byte, whatever their clusters are."""
        await self.write_zeroes(guest_offset, nbytes, unmap=True)

    async def grow(self, nbytes: int) -> None:
        """As of a node; nothing is under way. What is new is behind: a device or an export may hold anything there.

        A target that cannot grow leaves the two out of step for good.
        """
        old = self._source.size
        await self._source.grow(nbytes)
        nchunks = -(-self._source.size // CHUNK) - len(self._behind)
        self._behind.extend(bytes(nchunks))
        self._untouched.extend(bytes(nchunks))
        try:
            await self._target.grow(self._source.size)
        except (OSError, ImageError) as error:
            self._trouble = error
        except ValueError as error:
            self._trouble = ImageError(self._target.file.path, str(error))
        if self._trouble is not None:  # what is new may be missing
            self._break()
        elif self._source.size > old:
            self._fall_behind(old, self._source.size - old)

    async def _change_source(self, offset: int, nbytes: int, change: Change) -> None:
        try:
            await change(self._source)
        except BaseException:  # nobody knows what it holds
            self._fall_behind(offset, nbytes)
            raise

    async def _change_target(self, offset: int, nbytes: int, change: Change) -> None:
        """Its failure is none of the guest's."""
        self._touch(offset, nbytes)
        try:
            await change(self._target)
        except (OSError, ImageError) as error:
            self._fall_behind(offset, nbytes, error)
        except MemoryError:
            self._target.fail(no_memory())
            self._fall_behind(offset, nbytes, no_memory())

    def _in_step(self, offset: int, nbytes: int) -> list[tuple[int, int]]:
        """The parts of a range that is held of which the target has a copy, as (start, end)."""
        parts: list[tuple[int, int]] = []
        end = offset + nbytes
        while offset < end:
            chunk = offset // CHUNK
            is_behind = self._behind[chunk]
            other = self._behind.find(1 - is_behind, chunk)
            stop = end if other < 0 else min(end, other * CHUNK)
            if not is_behind:
                parts.append((offset, stop))
            offset = stop
        return parts

    def _fall_behind(self, offset: int, nbytes: int, trouble: OSError | ImageError | None = None) -> None:
        first, last = offset // CHUNK, (offset + nbytes - 1) // CHUNK
        self._set_behind(first, last + 1, is_behind=True)
        if not self._is_broken:  # else the reason is told once
            self._trouble = trouble or self._trouble
        self.on_behind()

    def lose(self, error: OSError) -> None:
        """The target can take nothing any more, because of *error*."""
        self._trouble = self._trouble or error
        self._target.fail(error)

    def _break(self) -> None:
        self._is_broken = True
        self._trouble = self._trouble or self._target.failure
        self.on_behind()

    def _hold(self, offset: int, nbytes: int) -> Hold:
        return self._locks.hold(offset // UNIT, (offset + nbytes - 1) // UNIT)


def _copy_of(source: Buffer) -> memoryview:
    """Raises: NotTried if there is no memory for it, before anything has happened."""
    try:
        return memoryview(source.load())
    except MemoryError:
        raise no_memory() from None


async def _write_to(node: Node, offset: int, data: MemoryBuffer) -> None:
    await node.write(offset, data)


async def _clear_in(node: Node, offset: int, nbytes: int, *, unmap: bool) -> None:
    await node.write_zeroes(offset, nbytes, unmap=unmap)
