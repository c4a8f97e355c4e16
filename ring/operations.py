"""Operations of Python on the worker's io_uring: begun here, finished by an event, queued when C's pool is full."""

import errno
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ring.native import Pointer, check, ffi, lib
from ring.request import GuestSlice

Piece = GuestSlice | bytes | bytearray | memoryview
Done = Callable[[int], None]  # called on the worker thread with 0 or -errno

READ, WRITE, DATA, DESPITE = 0, 1, 2, 4  # enum transfer_flag
HOST_MEMORY = (1 << 64) - 1  # PIECE_HOST: the piece is an address of this process
AGAIN, BUSY = -errno.EAGAIN, -errno.EBUSY  # not at once; no operation is free


class Operations:
    """The operations under way, by the number C gave them. An operation is complete or failed, never short."""

    def __init__(self, worker: Pointer) -> None:
        self._worker = worker
        self._done: list[Done | None] = [None] * lib.WORKER_OPERATIONS
        self._pinned: list[Any] = [None] * lib.WORKER_OPERATIONS  # what the kernel reads or writes meanwhile
        self._waiting: deque[tuple[Callable[[], int], Done, Any]] = deque()  # in order: a grace must not overtake
        self.in_flight = 0

    def transfer(self, flags: int, slot: int, host_offset: int, pieces: Sequence[Piece], done: Done) -> None:
        """Read into or write from *pieces*."""
        if len(pieces) == 1:
            source, start, nbytes, pin = _describe(pieces[0], writable=not flags & WRITE)
            self._begin(
                lambda: lib.worker_transfer(self._worker, flags, slot, host_offset, source, start, nbytes), done, pin
            )
            return
        array, pins = _describe_all(pieces, writable=not flags & WRITE)
        self._begin(
            lambda: lib.worker_transfer_pieces(self._worker, flags, slot, host_offset, array, len(pieces)),
            done,
            (array, pins),
        )

    def write_at_once(self, flags: int, slot: int, host_offset: int, pieces: Sequence[Piece]) -> bool:
        """Write *pieces* before this returns; False: not now, nothing has happened."""
        array, _pins = _describe_all(pieces, writable=False)
        result = lib.worker_write_at_once(self._worker, flags, slot, host_offset, array, len(pieces))
        return result != AGAIN and check(result) == 0

    def write_some(self, slot: int, parts: Sequence[tuple[int, bytes]]) -> tuple[int, int]:
        """Write the first of *parts* before this returns -> how many; and errno if the next failed, not for waiting."""
        offsets = ffi.new("uint64_t[]", [host_offset for host_offset, _ in parts])
        lengths = ffi.new("uint32_t[]", [len(data) for _, data in parts])
        content, done = b"".join([data for _, data in parts]), ffi.new("uint32_t *")
        result = lib.worker_write_some(self._worker, slot, len(parts), offsets, lengths, content, done)
        return done[0], 0 if result == AGAIN else -result

    def write_now(self, slot: int, host_offset: int, data: bytes) -> None:
        """Write *data*, a few bytes, before this returns."""
        check(lib.worker_write_entry(self._worker, slot, host_offset, data, len(data)))

    def zero(self, slot: int, host_offset: int, nbytes: int, done: Done) -> None:
        """Make a range read as zeros."""
        self._begin(lambda: lib.worker_zero(self._worker, slot, host_offset, nbytes), done, None)

    def sync(self, slot: int, done: Done) -> None:
        """Join the group commit of the file in *slot*."""
        self._begin(lambda: lib.worker_sync(self._worker, slot), done, None)

    def grace(self, done: Done) -> None:
        """Wait for what is in flight."""
        self._begin(lambda: lib.worker_grace(self._worker), done, None)

    def finish(self, number: int, result: int) -> None:
        """C says that an operation ended."""
        done = self._done[number]
        assert done is not None
        self._done[number] = None
        self._pinned[number] = None
        self.in_flight -= 1
        done(result)

    def begin_waiting(self) -> None:
        """Every event was seen: begin what had to wait, as far as C's pool allows."""
        if self._waiting:
            lib.worker_forget_delivered(self._worker)  # or nothing is left that would end and make room
        while self._waiting:
            begin, done, pin = self._waiting[0]
            if not self._try(begin, done, pin):
                break
            self._waiting.popleft()
            self.in_flight -= 1  # `_try` has counted it, too

    def _begin(self, begin: Callable[[], int], done: Done, pin: Any) -> None:
        if self._waiting or not self._try(begin, done, pin):
            self._waiting.append((begin, done, pin))
            self.in_flight += 1

    def _try(self, begin: Callable[[], int], done: Done, pin: Any) -> bool:
        number = begin()
        if number == BUSY:
            return False
        check(number, "operation of the worker")
        self.in_flight += 1
        self._done[number] = done
        self._pinned[number] = pin
        return True


def _describe(piece: Piece, *, writable: bool) -> tuple[int, int, int, Any]:
    """Say where *piece* is, for `struct piece`, and what keeps it there.

    That is a memoryview of ours, not cffi's hold on one: the traceback of a failed operation can make a cycle with it,
    and the garbage collector of CPython 3.11 crashes on a memoryview that something in the cycle holds.
    """
    if isinstance(piece, GuestSlice):
        return piece.request_id, piece.start, piece.nbytes, None
    pin = memoryview(piece)
    with ffi.from_buffer(piece, require_writable=writable) as content:
        return HOST_MEMORY, int(ffi.cast("uintptr_t", content)), len(content), pin


def _describe_all(pieces: Sequence[Piece], *, writable: bool) -> tuple[Any, list[Any]]:
    """A `struct piece[]`, and what keeps the bytes where it says."""
    described = [_describe(piece, writable=writable) for piece in pieces]
    return ffi.new("struct piece[]", [piece[:3] for piece in described]), [piece[3] for piece in described]
