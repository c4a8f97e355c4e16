"""An NBD export as the file that an image lies in: its length is given, and it has no lock and no descriptor here."""

import errno
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from qcow2.driver import operation as op
from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.far import End, FarFile, in_use
from qcow2.driver.file import ZEROS, HostFile, bytes_of
from qcow2.driver.nbdconnection import Command, Completion, NbdConnection

SECTOR_SIZE = 512
PIECE = 32 << 20  # bytes of a read or write, where the server knows no other limit
STRETCH = 128 << 20  # bytes of zeros by one request
LOOK = 2 << 30  # bytes that one request looks through, as QEMU's do: a disk of many TiB takes thousands
REQ_ONE = 1 << 3  # NBD_CMD_FLAG_REQ_ONE: others would be looked up for nothing
ZERO = 1 << 1  # NBD_STATE_ZERO
CONTEXT = "base:allocation"

Issue = Callable[[Any, Completion], object]


class NbdExport(FarFile, HostFile):
    """The export at *path*, a URI; is there once it is connected to."""

    def __init__(self, path: str, *, writable: bool, patience: float | None = None) -> None:
        """With *patience* it is lost when the server answers nothing for so many seconds.

        Raises: UnsupportedImage without libnbd.
        """
        super().__init__(path, -1, writable=writable)
        self.is_device = True
        self.connection = NbdConnection(path, patience=patience)
        self._nbytes = 0
        self._is_open = False
        self._piece = PIECE
        self._can_zero = self._can_flush = self._tells_extents = False

    def connect(self) -> "NbdExport":
        """Connect. Raises: OSError; EROFS for one that is to be written, and may not be."""
        try:
            self.connection.open(self._learn)
        except BaseException:
            self.close()
            raise
        self._is_open = True
        in_use.add(self)
        return self

    @property
    def is_open(self) -> bool:
        """Whether nobody has closed it; the server may have."""
        return self._is_open

    def _learn(self, handle: Any) -> None:
        """Raises: OSError, nbd.Error."""
        self._nbytes = handle.get_size()
        self._can_zero, self._can_flush = handle.can_zero(), handle.can_flush()
        self._tells_extents = handle.can_meta_context(CONTEXT)
        self._piece = min(PIECE, handle.get_block_size(2) or PIECE)  # NBD_INFO_BLOCK_SIZE: least, best, most
        if not self.writable:
            return
        if handle.is_read_only():
            raise OSError(errno.EROFS, "the export is read-only", self.path)
        if not self._can_flush:
            raise OSError(errno.EOPNOTSUPP, "the server offers no FLUSH: nothing says when a copy is stable", self.path)
        if handle.get_block_size(0) > SECTOR_SIZE:
            text = f"the server wants requests of {handle.get_block_size(0)} bytes at least, a disk has {SECTOR_SIZE}"
            raise OSError(errno.EINVAL, text, self.path)

    @property
    def is_lost(self) -> bool:
        """Whether nothing can be done with it any more."""
        return self.connection.is_lost

    def size(self) -> int:
        """Return the length in bytes."""
        return self._nbytes

    def close(self) -> None:
        """Leave the server; a second time does nothing."""
        self._is_open = False
        in_use.discard(self)
        self.connection.close()

    def give_up(self) -> None:
        """As `FarFile.give_up`."""
        self.connection.abort()

    def begin(self, operation: op.Operation, end: End) -> None:
        """As `FarFile.begin`."""
        match operation:
            case op.Read(host_offset=host_offset, nbytes=nbytes):
                data = bytearray(nbytes)
                self._read(host_offset, memoryview(data), lambda error: end(bytes(data), error))
            case op.ReadInto(host_offset=host_offset, target=MemoryBuffer(view=view)):
                self._read(host_offset, view, partial(end, None))
            case op.Write(host_offset=host_offset, pieces=pieces):
                self._write(host_offset, _joined([bytes_of(piece) for piece in pieces]), end)
            case op.Zero(host_offset=host_offset, nbytes=nbytes):
                self._zero(host_offset, min(nbytes, self._nbytes - host_offset), end)
            case op.Sync():
                self._flush(end)
            case op.Occupied(host_offset=host_offset, nbytes=nbytes):
                self._look(host_offset, nbytes, end)
            case op.Size() | op.Allocated():
                end(self._nbytes, None)
            case op.Resize(nbytes=nbytes):
                end(None, None if nbytes <= self._nbytes else self._no_space())
            case op.WriteSome():
                end(0, None)
            case op.CopyRange():
                end(False, None)
            case op.CopyData() | op.Equal():
                end(None, OSError(errno.EOPNOTSUPP, "not a file of this host", self.path))
            case _:
                end(None, TypeError(f"not an operation of an export: {operation!r}"))

    def _read(self, host_offset: int, view: memoryview, done: Callable[[BaseException | None], None]) -> None:
        inside = max(0, min(len(view), self._nbytes - host_offset))
        view[inside:] = bytes(len(view) - inside)

        def parts() -> Iterator[Issue]:
            for start in range(0, inside, self._piece):
                yield partial(_pread, view[start : min(start + self._piece, inside)], host_offset + start)

        self._each(parts(), done)

    def _write(self, host_offset: int, view: memoryview, end: End) -> None:
        if host_offset + len(view) > self._nbytes:
            end(None, self._no_space())
            return

        def parts() -> Iterator[Issue]:
            for start in range(0, len(view), self._piece):
                yield partial(_pwrite, view[start : start + self._piece], host_offset + start)

        self._each(parts(), partial(end, None))

    def _zero(self, host_offset: int, nbytes: int, end: End) -> None:
        def parts() -> Iterator[Issue]:
            step = STRETCH if self._can_zero else min(self._piece, len(ZEROS))
            for start in range(host_offset, host_offset + nbytes, step):
                count = min(step, host_offset + nbytes - start)
                if self._can_zero:
                    yield partial(_zero, count, start)
                else:
                    yield partial(_pwrite, memoryview(ZEROS)[:count], start)

        self._each(parts(), partial(end, None))

    def _flush(self, end: End) -> None:
        if self.writable:
            self.connection.begin(Command(_flush, partial(end, None), is_flush=True))
        else:
            end(None, None)

    def _look(self, host_offset: int, nbytes: int, end: End) -> None:
        if not self._tells_extents or host_offset >= self._nbytes:
            end((host_offset < self._nbytes, nbytes), None)
            return
        found: list[int] = []  # bytes and flags of each extent

        def heard(context: str, offset: int, entries: list[int], error: Any) -> int:
            found.extend(entries)
            return 0

        def ended(error: BaseException | None) -> None:
            end(None if error is not None else _first_run(found, nbytes), error)

        count = min(nbytes, LOOK, self._nbytes - host_offset)
        self.connection.begin(Command(partial(_status, count, host_offset, heard), ended))

    def _each(self, parts: Iterator[Issue], done: Callable[[BaseException | None], None]) -> None:
        """Do one after the other, until one fails."""

        def go_on(error: BaseException | None) -> None:
            issue = next(parts, None) if error is None else None
            if issue is None:
                done(error)
            else:
                self.connection.begin(Command(issue, go_on))

        go_on(None)

    def _no_space(self) -> OSError:
        return OSError(errno.ENOSPC, f"the export has {self._nbytes} bytes", self.path)


def _joined(views: list[memoryview]) -> memoryview:
    """All of them as one; a copy if they are several."""
    return views[0] if len(views) == 1 else memoryview(b"".join(views))


def _pread(view: memoryview, host_offset: int, handle: Any, completion: Completion) -> None:
    handle.aio_pread(view, host_offset, completion=completion)


def _pwrite(view: memoryview, host_offset: int, handle: Any, completion: Completion) -> None:
    handle.aio_pwrite(view, host_offset, completion=completion)


def _zero(nbytes: int, host_offset: int, handle: Any, completion: Completion) -> None:
    handle.aio_zero(nbytes, host_offset, completion=completion)


def _flush(handle: Any, completion: Completion) -> None:
    handle.aio_flush(completion=completion)


def _status(nbytes: int, host_offset: int, heard: Callable[..., int], handle: Any, completion: Completion) -> None:
    handle.aio_block_status(nbytes, host_offset, heard, completion=completion, flags=REQ_ONE)


def _first_run(entries: list[int], nbytes: int) -> tuple[bool, int]:
    """As `Occupied`: what the first of the extents is, and those that are the same."""
    pairs = [*zip(entries[::2], entries[1::2], strict=True)]
    if not pairs:
        return True, nbytes
    is_zero, total = bool(pairs[0][1] & ZERO), 0
    for length, flags in pairs:
        if bool(flags & ZERO) != is_zero:
            break
        total += length
    if not total:  # which no server may say: who asks for what comes after it would ask for the same
        return True, nbytes
    return not is_zero, min(total, nbytes)
