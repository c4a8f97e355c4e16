"""Blocking driver: the engine's operations as system calls on open files, one at a time.

Used where nothing else is going on: create, check, convert, and the library's synchronous face.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from qcow2.driver import bulk
from qcow2.driver import operation as op
from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.far import FarFile, wait_for
from qcow2.driver.memory import SharedMemory
from qcow2.driver.task import Scheduler, Task
from qcow2.error import no_memory
from qcow2.native import check, lib

T = TypeVar("T")

IOV_MAX = 1024
ZEROS = bytes(1 << 20)
# EINVAL: a device whose blocks are larger than the range.
CANNOT_PUNCH = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)


def keep_access_time(fd: int) -> None:
    """Let reads by *fd* leave the time of last access alone: looking at it takes 70 ns of each, of 1,000 in all."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_NOATIME)
    except PermissionError:
        return  # it is another user's


class HostFile:
    """An open regular file or block device; a context manager that closes it."""

    def __init__(self, path: str, fd: int, *, writable: bool) -> None:
        self.path = path
        self.fd = fd
        self.life_fd = -1  # says that this process lives: see `qcow2.lock`
        self.writable = writable
        self.is_device = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path!r}>"

    @classmethod
    def open(cls, path: str, *, writable: bool = False, create: bool = False) -> "HostFile":
        """Open *path*; *create* makes it, or empties what is there.

        Raises: OSError naming the path; EISDIR, or EINVAL if it is neither a regular file nor a block device.
        """
        flags = os.O_CLOEXEC | os.O_NONBLOCK | (os.O_RDWR if writable or create else os.O_RDONLY)
        fd = os.open(path, flags | (os.O_CREAT | os.O_TRUNC if create else 0), 0o666)
        file = cls(path, fd, writable=writable or create)
        try:
            file._refuse_odd_kinds()
        except OSError:
            file.close()
            raise
        keep_access_time(fd)
        return file

    def _refuse_odd_kinds(self) -> None:
        mode = os.fstat(self.fd).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self.path)
        self.is_device = stat.S_ISBLK(mode)
        if not (self.is_device or stat.S_ISREG(mode)):
            raise OSError(errno.EINVAL, "neither a regular file nor a block device", self.path)

    @property
    def is_open(self) -> bool:
        """Whether nobody has closed it."""
        return self.fd >= 0

    def size(self) -> int:
        """Return the length in bytes."""
        return os.lseek(self.fd, 0, os.SEEK_END)

    def set_length(self, nbytes: int) -> None:
        """Be *nbytes* long, of a regular file; what is new reads as zeros.

        What is empty is not emptied again: ext4 then waits, when the file is closed, for all that was written to it.
        """
        status = os.fstat(self.fd)
        if nbytes or status.st_size or status.st_blocks:
            os.ftruncate(self.fd, nbytes)

    def close(self) -> None:
        """Close the descriptor; a second time does nothing.

        Raises: OSError, as a network's file system may: what was not synced may be lost. It is closed all the same.
        """
        fd, self.fd = self.fd, -1
        life_fd, self.life_fd = self.life_fd, -1
        try:
            if fd >= 0:
                os.close(fd)
        finally:
            if life_fd >= 0:
                os.close(life_fd)

    def __enter__(self) -> "HostFile":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class BlockingDriver:
    """Runs coroutines of the engine to their end, each operation finished before the next begins."""

    def __init__(self) -> None:
        self._scheduler = Scheduler(self._start)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Return the result of *coroutine*; everything it spawned has ended too, or waits for another run."""
        ended: list[Task] = []
        self._scheduler.spawn(coroutine, ended.append)
        self._scheduler.run()
        return result_of(coroutine, ended)

    def _start(self, task: Task, operation: op.Operation) -> None:
        go_on(self._scheduler, task, *outcome(operation))


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run *coroutine* to its end on a blocking driver of its own."""
    return BlockingDriver().run(coroutine)


def result_of(coroutine: Coroutine[Any, Any, T], ended: list[Task]) -> T:
    """What *coroutine*, whose task is in *ended* if it has ended, returned; nobody is left to do anything for it."""
    if not ended:
        coroutine.close()
        raise RuntimeError("the coroutine waits for a signal that nobody is left to set")
    error = ended[0].take_error()
    if error is not None:
        try:
            raise error
        finally:
            del error  # whose traceback has this frame
    result: T = ended[0].result
    return result


def go_on(scheduler: Scheduler, task: Task, value: Any, error: BaseException | None) -> None:
    """Let *task* go on with the outcome of its operation."""
    if error is None:
        scheduler.resume(task, value)
    else:
        scheduler.fail(task, error)


def outcome(operation: op.Operation) -> tuple[Any, BaseException | None]:
    """The result of *operation*, or the error, whatever it is: it belongs to the coroutine that awaits."""
    try:
        return perform(operation), None
    except MemoryError:
        return None, no_memory()
    except BaseException as error:  # the coroutine's to handle
        return None, error


def perform(operation: op.Operation) -> Any:
    """Do what *operation* promises and return its result. Raises: OSError naming the file."""
    try:
        return _perform(operation)
    except OSError as error:
        if error.filename is None and isinstance(file := getattr(operation, "file", None), HostFile):
            error.filename = file.path
        raise
    except OverflowError as error:  # an image may name any place
        path = file.path if isinstance(file := getattr(operation, "file", None), HostFile) else None
        raise OSError(errno.EOVERFLOW, "no file reaches as far as 2^63 bytes", path) from error


def _perform(operation: op.Operation) -> Any:
    if isinstance(file := getattr(operation, "file", None), FarFile):
        return wait_for(file, operation)
    performer = PERFORMERS.get(type(operation))
    if performer is None:
        raise TypeError(f"not an operation: {operation!r}")
    return performer(operation)


PERFORMERS: dict[type[op.Operation], Callable[[Any], Any]] = {  # looked up for each: a match would try them in turn
    op.Read: lambda each: _read(_host(each.file), each.host_offset, each.nbytes),
    op.ReadInto: lambda each: _read_into(_host(each.file), each.host_offset, each.target),
    op.Write: lambda each: _write(_host(each.file), each.host_offset, [bytes_of(p) for p in each.pieces]),
    op.WriteDespite: lambda each: _write(_host(each.file), each.host_offset, [bytes_of(p) for p in each.pieces]),
    op.WriteSome: lambda each: 0,  # who calls us waits for each
    op.Zero: lambda each: _zero(_host(each.file), each.host_offset, each.nbytes),
    op.Resize: lambda each: _resize(_host(each.file), each.nbytes, reserve=each.reserve),
    op.Sync: lambda each: os.fdatasync(_host(each.file).fd),
    op.Size: lambda each: _host(each.file).size(),
    op.Allocated: lambda each: _allocated(_host(each.file)),
    op.Occupied: lambda each: _occupied(_host(each.file), each.host_offset, each.nbytes),
    op.Store: lambda each: store(each, _write_mark, lambda offset, data: None),
    op.Grace: lambda each: None,
    op.Compute: lambda each: each.function(),
    op.Together: lambda each: _together(each),
    op.CopyRange: lambda each: _copy_range(each, _host(each.file), _host(each.target)),
    op.CopyData: lambda each: bulk.copy_data(each, _host(each.file).fd, _host(each.target).fd),
    op.Equal: lambda each: bulk.count_equal(each, _host(each.file).fd, _host(each.other).fd),
}
NO_OFFLOAD = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)


def _together(operation: op.Together) -> Any:
    if not _at_once(operation.operations):
        for each in operation.operations:
            perform(each)
    return operation.function()


def _at_once(operations: Sequence[op.ReadInto | op.Write]) -> bool:
    """Do all of them in one call, if they are of one file. False: nothing has been done. Raises: OSError."""
    file = operations[0].file if operations else None
    if not isinstance(file, HostFile) or isinstance(file, FarFile) or any(each.file is not file for each in operations):
        return False
    try:
        return bulk.is_transferred(file.fd, operations)
    except OSError as error:
        error.filename = file.path
        raise


def _copy_range(operation: op.CopyRange, source: HostFile, target: HostFile) -> bool:
    done = 0
    while done < operation.nbytes:
        places = operation.host_offset + done, operation.target_offset + done
        try:
            count = os.copy_file_range(source.fd, target.fd, operation.nbytes - done, *places)
        except OSError as error:
            if error.errno in NO_OFFLOAD:
                return False
            raise
        if not count:  # past the end of the source
            return False
        done += count
    return True


def _host(file: op.File) -> HostFile:
    if not isinstance(file, HostFile):
        raise TypeError(f"not a file of this driver: {file!r}")
    return file


def store(operation: op.Store, write_mark: Callable[[op.Mark], None], on_stored: Callable[[int, bytes], None]) -> None:
    """Do what *operation* promises; *write_mark* has written when it returns, *on_stored* is told of each part."""
    memory = _shared(operation.memory)
    try:
        for offset, data in operation.parts:
            memory.store(offset, data)
            on_stored(offset, data)
        if operation.mark is not None:
            write_mark(operation.mark)
    except (OSError, MemoryError):
        operation.undo()
        raise


def _write_mark(mark: op.Mark) -> None:
    _write(_host(mark.file), mark.host_offset, [memoryview(mark.data)])


def _shared(memory: op.Memory) -> SharedMemory:
    if not isinstance(memory, SharedMemory):
        raise TypeError(f"not memory of this driver: {memory!r}")
    return memory


def bytes_of(piece: bytes | bytearray | memoryview | op.Buffer) -> memoryview:
    """*piece* as memory; a copy if it is not ours."""
    if isinstance(piece, MemoryBuffer):
        return piece.view
    if isinstance(piece, bytes | bytearray | memoryview):
        return memoryview(piece)
    return memoryview(piece.load())


def _allocated(file: HostFile) -> int:
    return file.size() if file.is_device else os.fstat(file.fd).st_blocks * 512


def _occupied(file: HostFile, host_offset: int, nbytes: int) -> tuple[bool, int]:
    end = host_offset + nbytes
    data = _seek(file, host_offset, os.SEEK_DATA, end)
    if data > host_offset:
        return False, min(data, end) - host_offset
    return True, min(_seek(file, host_offset, os.SEEK_HOLE, end), end) - host_offset


def _seek(file: HostFile, host_offset: int, whence: int, otherwise: int) -> int:
    """Where the next data or hole begins; *otherwise* if there is none. A device has data only."""
    if file.is_device:
        return host_offset if whence == os.SEEK_DATA else otherwise
    try:
        return os.lseek(file.fd, host_offset, whence)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return otherwise
        raise


def _read(file: HostFile, host_offset: int, nbytes: int) -> bytes:
    data = os.pread(file.fd, nbytes, host_offset)
    if len(data) == nbytes:
        return data
    buffer = bytearray(nbytes)
    buffer[: len(data)] = data
    _fill(file, host_offset + len(data), memoryview(buffer)[len(data) :])
    return bytes(buffer)


def _fill(file: HostFile, host_offset: int, view: memoryview) -> None:
    """Read until *view* is full or the file ends; the rest of *view* is zeroed."""
    while len(view):
        count = os.preadv(file.fd, [view], host_offset)
        if count == 0:
            view[:] = bytes(len(view))
            return
        host_offset += count
        view = view[count:]


def _read_into(file: HostFile, host_offset: int, target: op.Buffer) -> None:
    if isinstance(target, MemoryBuffer):
        _fill(file, host_offset, target.view)
    else:
        target.store(_read(file, host_offset, len(target)))


def _write(file: HostFile, host_offset: int, pieces: Sequence[memoryview]) -> None:
    pieces = [piece for piece in pieces if len(piece)]
    while pieces:
        count = os.pwritev(file.fd, pieces[:IOV_MAX], host_offset)
        host_offset += count
        pieces = _without_front(pieces, count)


def _without_front(pieces: Sequence[memoryview], count: int) -> list[memoryview]:
    left = []
    for piece in pieces:
        if count < len(piece):
            left.append(piece[count:])
        count = max(0, count - len(piece))
    return left


def _zero(file: HostFile, host_offset: int, nbytes: int) -> None:
    nbytes = min(nbytes, file.size() - host_offset)
    if nbytes <= 0:
        return
    result = lib.punch_hole(file.fd, host_offset, nbytes)
    if -result in CANNOT_PUNCH:
        _write_zeros(file, host_offset, nbytes)
    else:
        check(result)


def _write_zeros(file: HostFile, host_offset: int, nbytes: int) -> None:
    for start in range(0, nbytes, len(ZEROS)):
        _write(file, host_offset + start, [memoryview(ZEROS)[: nbytes - start]])


def _resize(file: HostFile, nbytes: int, *, reserve: bool) -> None:
    if not file.is_device:
        if reserve:
            _reserve(file, nbytes)
        file.set_length(nbytes)
    elif nbytes > file.size():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.path)


def _reserve(file: HostFile, nbytes: int) -> None:
    """Have the host set space aside for what a file of *nbytes* has more than now; its length stays."""
    size = file.size()
    if nbytes <= size:
        return
    result = lib.reserve_space(file.fd, size, nbytes - size)
    if lib.lacks_space(result):
        os.ftruncate(file.fd, size)  # gives back what there was
        check(result)
