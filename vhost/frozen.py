"""The disk as it was at one moment, kept for a copy while a guest writes on: copy before write.

The disk is cut into chunks of 64 KiB. As long as a chunk is wanted its bit is set, and who wants to change it comes to
`save` first: C leaves such requests to Python (`NativeBlock.set_frozen`), and Python asks before it begins them. What
is saved is in memory then, so a change waits for the disk, and for the target only while too much waits in memory. What
nobody changes is saved by `walk`. Once the last bit is clear, all requests are as quick as ever.

The disk is worth more than its copy: whatever goes wrong ends the copy, and no request of the guest.
"""

import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from qcow2 import ImageError
from qcow2.driver.operation import Signal, give_way
from qcow2.engine.bitmaptable import change_bits, count_bits
from qcow2.engine.rangelock import RangeLocks
from qcow2.job.reins import Reins
from qcow2.job.source import Content, Source
from qcow2.node.node import Node
from vhost.problem import describe

CHUNK_BITS = 16  # BLOCK_FROZEN_BITS
CHUNK = 1 << CHUNK_BITS
WINDOW = 8  # chunks that are read at a time, while changes of them wait
QUICK_SECONDS = 0.002  # of a window, which is memory's pace and not a disk's: its neighbours cost a change little
WIDE = 4096  # chunks of zeros that are passed at a time
AHEAD_BYTES = 16 << 20  # that wait for the target before the walk does
MOST_BYTES = 64 << 20  # before a request of the guest does
AWAITED_BYTES = 256 << 20  # before one does that somebody awaits: a resize, or the end
PATIENCE_SECONDS = 10.0  # of such a request, while the target takes nothing
SET = re.compile(rb"[^\0]")
NOT_FULL = re.compile(rb"[^\xff]")


@dataclass(slots=True)
class Saved:
    """Bytes of the disk for the target; or zeros, if there is no data."""

    guest_offset: int
    nbytes: int
    data: memoryview | None
    place: object = None  # where the target has put it, once it has decided


class Wanted:
    """The chunks of a disk of *size* bytes that are wanted; those in *stretches*, (start, end) in bytes."""

    def __init__(self, size: int, stretches: list[tuple[int, int]]) -> None:
        self.bits = bytearray(-(-size // (8 * CHUNK)))
        for start, end in stretches:
            first, last = start >> CHUNK_BITS, min(end, size) - 1 >> CHUNK_BITS
            change_bits(self.bits, first, last + 1, are_set=True)

    @classmethod
    def of_bits(cls, size: int, bits: bytes) -> "Wanted":
        """Those whose bit is set, of a disk of *size* bytes: requests wait, and runs are many where a guest writes."""
        wanted = cls(size, [])
        wanted.bits[:] = bits[: len(wanted.bits)].ljust(len(wanted.bits), b"\0")
        wanted.clear(-(-size // CHUNK), wanted.end)
        return wanted

    @property
    def end(self) -> int:
        """After the last chunk."""
        return len(self.bits) * 8

    def nbytes(self, size: int) -> int:
        """How many bytes of a disk of *size* bytes they are."""
        count = count_bits(self.bits)
        has_last = size and self.next(size - 1 >> CHUNK_BITS, self.end) == size - 1 >> CHUNK_BITS
        return count * CHUNK - (-size % CHUNK if has_last else 0)

    def clear(self, first: int, end: int) -> None:
        """Those from *first* to before *end* are not wanted any more."""
        change_bits(self.bits, first, end, are_set=False)

    def next(self, first: int, end: int) -> int:
        """The first one from *first* on; *end* if there is none before."""
        return self._find(first, end, is_set=True)

    def run_end(self, first: int, end: int) -> int:
        """Where the run that *first* is in ends, *end* at the latest."""
        return self._find(first, end, is_set=False)

    def _find(self, chunk: int, end: int, *, is_set: bool) -> int:
        """The first one from *chunk* to before *end* that *is_set*, or is not: whole bytes of others are skipped."""
        worth_a_look = SET if is_set else NOT_FULL
        while chunk < end:
            if (self.bits[chunk // 8] >> chunk % 8 & 1) == is_set:
                return chunk
            chunk += 1
            if chunk % 8 == 0 and chunk < end:
                found = worth_a_look.search(self.bits, chunk // 8, -(-end // 8))
                if found is None:
                    return end
                chunk = max(chunk, found.start() * 8)
        return end


class Frozen:
    """What is *wanted* of the disk of *image*, given to *put* as it is saved. On the worker.

    `taken`, `stop` and `lose` are told what becomes of it; `look` is called now and then, or patience would not end.
    """

    def __init__(
        self,
        image: Node,
        wanted: Wanted,
        put: Callable[[Saved], None],
        are_all_awaited: Callable[[], bool] = lambda: False,
    ) -> None:
        """*are_all_awaited()*: whether somebody waits for the end of all requests."""
        self.image = image
        self._size = image.size
        self._source = Source.of(image)
        self._wanted = wanted
        self._put = put
        self._are_all_awaited = are_all_awaited
        self.ended = ""  # why, for good
        self.on_end: Callable[[], None] = lambda: None  # to be told of that
        self._stopped: Exception | None = None  # why the target takes nothing more for now
        self._reins = Reins()
        self._locks = RangeLocks()
        self._total = wanted.nbytes(self._size)
        self._saved = 0
        self._waiting = 0  # bytes in memory that the target has not taken
        self._passing = 0  # stretches without any that it has not taken
        self._moved = time.monotonic()  # when it took something last, or had nothing to take
        self._span = WINDOW  # chunks that are saved together where one of them is about to change
        self._turn = Signal()

    @property
    def bits(self) -> bytearray:
        """Of the chunks that are wanted still, as `NativeBlock.set_frozen` takes them."""
        return self._wanted.bits

    async def save(self, guest_offset: int, nbytes: int) -> None:
        """Return once nothing of the range, which is about to change, is wanted."""
        chunk, end = self._spanned(guest_offset >> CHUNK_BITS, -(-min(guest_offset + nbytes, self._size) // CHUNK))
        try:
            while (chunk := self._wanted.next(chunk, end)) < end:
                stop = min(chunk + await self._stride(chunk), end)
                async with self._locks.hold(chunk, stop - 1):
                    await self._save(chunk, stop, self._have_room)
        except MemoryError:
            self.lose("no memory for what is about to change")

    def _spanned(self, chunk: int, end: int) -> tuple[int, int]:
        """The chunks from *chunk* to before *end*, with their neighbours if all of them are to be saved together.

        Each change of a chunk that is wanted comes to Python, which costs it more than to read its neighbours, too.
        """
        span = self._span
        if self._wanted.next(chunk, end) == end:
            return end, end
        return chunk - chunk % span, min(end + -end % span, self._wanted.end)

    async def walk(self, reins: Reins) -> None:
        """Save what is wanted, and return once the target has taken all; begun again, it goes on where it was.

        Raises: Cancelled, ValueError; OSError of the target.
        """
        self._reins = reins
        reins.begin(self._total)
        reins.advance(self._saved)
        chunk, end = 0, self._wanted.end
        while (chunk := self._wanted.next(chunk, end)) < end:
            self._require_going()
            stop = min(chunk + await self._stride(chunk), end)
            await reins.wait((stop - chunk) * CHUNK if stop - chunk <= WINDOW else 0)
            await self._await_room()  # not with the lock, which a request of the guest may wait for
            async with self._locks.hold(chunk, stop - 1):
                await self._save(chunk, stop, self._has_room)
            if self._wanted.next(chunk, stop) < stop:
                continue
            if stop // WIDE > chunk // WIDE:
                self._give(Saved(stop << CHUNK_BITS, 0, None))
            chunk = stop
        while self._waiting or self._passing:
            self._require_going()
            await self._turn.wait()
        self._require_going()

    async def _stride(self, chunk: int) -> int:
        """How many chunks to look at together: many where zeros cost nothing."""
        try:
            content, nbytes = await self._source.find(chunk << CHUNK_BITS)
        except (OSError, ImageError):  # said by who reads it
            return WINDOW
        if content is not Content.ZEROS or nbytes < WINDOW * CHUNK:
            return WINDOW
        await give_way()  # or many of them in a row would hold up all else on this thread
        return min(nbytes // CHUNK, WIDE)

    def _require_going(self) -> None:
        if self.ended:
            raise ValueError(self.ended)
        self._reins.require_going()
        if self._stopped is not None:
            raise self._stopped

    async def _save(self, chunk: int, end: int, has_room: Callable[[], Awaitable[bool]]) -> None:
        """Save what is wanted of these chunks, which are locked, or what there is room for."""
        while (chunk := self._wanted.next(chunk, end)) < end:
            start = chunk << CHUNK_BITS
            await self._reins.give_way()
            try:
                stop = min(self._wanted.run_end(chunk, end) << CHUNK_BITS, self._size)
                saved = await self._read(start, stop, has_room)
            except (OSError, ImageError) as error:
                self.lose(describe(error))
                return
            if self.ended or saved is None:
                return
            chunk = -(-(start + saved.nbytes) // CHUNK)
            self._wanted.clear(start >> CHUNK_BITS, chunk)
            self._saved += saved.nbytes
            self._reins.advance(saved.nbytes)
            self._give(saved)

    def _give(self, saved: Saved) -> None:
        self._passing += saved.data is None
        self._put(saved)

    async def _read(self, start: int, end: int, has_room: Callable[[], Awaitable[bool]]) -> Saved | None:
        """What is at the front of the range, whole chunks of it; None without room. Raises: OSError, ImageError."""
        content, nbytes = await self._source.find(start)
        zeros = min(nbytes, end - start) if content is Content.ZEROS else 0
        if zeros == end - start or zeros >= CHUNK:
            return Saved(start, zeros if zeros == end - start else zeros - zeros % CHUNK, None)
        if not await has_room():
            return None
        data = memoryview(bytearray(min(end - start, WINDOW * CHUNK)))
        self._moved = self._moved if self._waiting else time.monotonic()
        self._waiting += len(data)
        began = time.monotonic()
        await self._source.read(start, data)
        self._span = WINDOW if time.monotonic() - began < QUICK_SECONDS else 1
        return Saved(start, len(data), data)

    async def _await_room(self) -> None:
        """The walk leaves memory to the guest. Raises: Cancelled, ValueError; what stopped the target."""
        while self._waiting >= AHEAD_BYTES:
            self._require_going()
            await self._turn.wait()

    async def _has_room(self) -> bool:
        """The walk does not wait where others wait for it."""
        return self._waiting < MOST_BYTES

    async def _have_room(self) -> bool:
        """A request of the guest waits for the target, but not for ever; and not at all if all requests are awaited."""
        while self._waiting >= MOST_BYTES and not self.ended:
            if self._are_all_awaited() and self._waiting < AWAITED_BYTES:
                break
            if self._stopped is not None or time.monotonic() - self._moved >= PATIENCE_SECONDS:
                why = "takes nothing" if self._stopped is None else "has failed"
                self.lose(f"the guest wrote on, and {self._waiting} bytes wait for a target that {why}")
                break
            await self._turn.wait()
        return True

    def taken(self, nbytes: int) -> None:
        """The target has taken *nbytes* more, or, if that is 0, what has none in memory."""
        self._waiting -= nbytes
        self._passing -= nbytes == 0
        self._moved = time.monotonic()
        self.look()

    def stop(self, error: Exception) -> None:
        """The target takes nothing more because of *error*: until `try_again`, or after an ImageError for good."""
        if isinstance(error, ImageError):
            self._end(describe(error))
        else:
            self._stopped = error
            self.look()

    def try_again(self) -> None:
        """The target is given once more what it did not take: what stopped it does not count for the next `walk`."""
        self._stopped = None

    def lose(self, why: str) -> None:
        """Nothing is wanted any more: it cannot be had."""
        self._end(f"the disk of that moment is lost: {why}")

    def _end(self, why: str) -> None:
        """Nothing is wanted any more."""
        self.ended = self.ended or why
        self._reins.cancel()  # a walk that is held, or slow, ends as well
        self._wanted.clear(0, self._wanted.end)
        self.look()
        self.on_end()

    def look(self) -> None:
        """Let whoever waits look again."""
        turn, self._turn = self._turn, Signal()
        turn.set()
