"""A record of what a worker was asked and what it did, in one order: written by C (`trace.h`), read here.

What came before the first request is told by `Kind.FILE` and `Kind.CONTENT`; who writes a trace adds them.
"""

import errno
import os
import struct
from collections.abc import Iterator
from enum import IntEnum, IntFlag
from types import TracebackType
from typing import BinaryIO, NamedTuple

from ring.native import NULL, Pointer, check, ffi, lib

RECORD = struct.Struct("=IiQQQIIII")  # struct trace_record, field for field; its content follows
VERSION = 1  # TRACE_VERSION
MAGIC = b"vhost-user trace"
LIMIT = 4 << 30  # bytes of a file
RUN_MAX = 1 << 20  # bytes of one CONTENT


class Kind(IntEnum):
    """What a record tells; `enum trace_kind` says what its fields mean then."""

    BEGIN = 1
    FILE = 2
    CONTENT = 3
    REQUEST = 4
    ANSWER = 5
    WRITE = 6
    ZERO = 7
    RESIZE = 8
    STORE = 9
    SYNC = 10
    DONE = 11
    FULL = 12


class Flag(IntFlag):
    """`enum trace_flag`."""

    WRITABLE = 1
    WRITETHROUGH = 2


class Record(NamedTuple):
    """One of them, with its content."""

    kind: Kind
    result: int = 0
    id: int = 0
    offset: int = 0
    nbytes: int = 0
    slot: int = 0
    type: int = 0
    flags: Flag = Flag(0)
    content: bytes = b""


class TraceError(Exception):
    """A file is not a trace, or not one that this program understands."""


class Trace:
    """A trace being written, a context manager; while a worker has it, use it on the worker's thread only."""

    def __init__(self, path: str, *, limit: int = LIMIT) -> None:
        """Create *path*, which must not exist: nothing is overwritten.

        Raises: OSError naming the path.
        """
        self.path = path
        self.error = 0  # errno of what ended it early, after `close`; EFBIG: it came to its limit
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._native: Pointer = lib.trace_create(self._fd, limit)
        if not self._native:
            os.close(self._fd)
            raise MemoryError("no memory for the buffer of a trace")

    def __enter__(self) -> "Trace":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def native(self) -> Pointer:
        """Its `struct trace`, valid until `close`."""
        return self._native

    def close(self) -> None:
        """Write out what is buffered; a second time does nothing. No worker has it any more."""
        if self._native:
            self.error = -lib.trace_close(self._native)
            self._native = NULL
            os.close(self._fd)

    def add_file(self, slot: int, fd: int, path: str, *, writable: bool) -> None:
        """Tell of the file in *slot*, and what it holds now if this worker may change it.

        Raises: OSError; EFBIG if that alone is more than the trace may hold.
        """
        nbytes = os.lseek(fd, 0, os.SEEK_END)
        flags = Flag.WRITABLE if writable else Flag(0)
        check(self._add(Record(Kind.FILE, nbytes=nbytes, slot=slot, flags=flags, content=os.fsencode(path))), self.path)
        if writable:
            for start, end in _data_runs(fd, nbytes):
                for offset in range(start, end, RUN_MAX):
                    content = os.pread(fd, min(RUN_MAX, end - offset), offset)
                    record = Record(Kind.CONTENT, offset=offset, nbytes=len(content), slot=slot, content=content)
                    check(self._add(record), self.path)

    def resize(self, slot: int, nbytes: int) -> int:
        """Tell that the file in *slot* is about to become *nbytes* long; the operation's id, for `done`."""
        return lib.trace_resize(self._native, slot, nbytes)

    def store(self, offset: int, content: bytes) -> None:
        """Tell that *content* was put into the shared memory that outlives this process."""
        self._add(Record(Kind.STORE, offset=offset, nbytes=len(content), content=content))

    def done(self, operation: int, result: int) -> None:
        """Tell how an operation ended: 0 or -errno."""
        lib.trace_done(self._native, operation, result)

    def _add(self, record: Record) -> int:
        """0, or -errno of what ended the trace, now or before."""
        packed = ffi.new("struct trace_record *")
        ffi.buffer(packed)[:] = RECORD.pack(*record[:-1], len(record.content))
        content = ffi.from_buffer(record.content)
        return lib.trace_add_bytes(self._native, packed, content, len(record.content))


def _data_runs(fd: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """The stretches of a file that are not holes; all of it where the file system cannot tell."""
    end = 0
    while end < nbytes:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def read_trace(path: str | os.PathLike[str]) -> Iterator[Record]:
    """The records of a trace after its first; one that was cut short ends without its last, partial record.

    Raises: OSError; TraceError for anything else than a trace of this version.
    """
    with open(path, "rb") as file:
        begin = _read_record(file)
        if begin is None or (begin.kind, begin.content) != (Kind.BEGIN, MAGIC):
            raise TraceError(f"{os.fspath(path)}: not a trace")
        if (begin.offset, begin.nbytes) != (VERSION, RECORD.size):
            raise TraceError(f"{os.fspath(path)}: a trace of version {begin.offset}, this program reads {VERSION}")
        while (record := _read_record(file)) is not None:
            yield record


def _read_record(file: BinaryIO) -> Record | None:
    head = file.read(RECORD.size)
    if len(head) < RECORD.size:
        return None
    kind, result, number, offset, nbytes, slot, type_, flags, content_nbytes = RECORD.unpack(head)
    padded = file.read(content_nbytes + -content_nbytes % 8)
    if len(padded) < content_nbytes + -content_nbytes % 8:
        return None
    try:
        known = Kind(kind)
    except ValueError:
        raise TraceError(f"{file.name}: no record has kind {kind}") from None
    return Record(known, result, number, offset, nbytes, slot, type_, Flag(flags), padded[:content_nbytes])
