"""Shared memory that outlives the process: a file of a memory file system, reached by a name that others can guess.

So whatever is found there is input: it must be a plain file of our own that nobody else may write.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any

from qcow2.native import ffi

DEFAULT_DIRECTORY = "/dev/shm"


class SharedMemory:
    """The file at *path*, of *nbytes*, made when it is first stored to, and locked as long as its maker lives."""

    def __init__(self, path: str, nbytes: int = 0) -> None:
        self.path = path
        self.nbytes = nbytes
        self._map: mmap.mmap | None = None
        self._fd = -1

    def load(self, is_trusted: Callable[[int], bool], limit: int, nbytes: int | None = None) -> bytes:
        """All an earlier process left there, or its first *nbytes*. Raises: as `reading`."""
        with self.reading(is_trusted, limit) as (read, size):
            return read(0, size if nbytes is None else min(size, nbytes))

    @contextlib.contextmanager
    def reading(
        self, is_trusted: Callable[[int], bool], limit: int
    ) -> Iterator[tuple[Callable[[int, int], bytes], int]]:
        """What reads at an offset so many bytes that an earlier process left there, and how many there are.

        *is_trusted* says of which users we take anything.
        Raises: OSError; EPERM if what is there is not what such a user's process could have left, EFBIG if it is longer
        than *limit*.
        """
        fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self._refuse_foreign(os.fstat(fd), is_trusted)
            size = os.fstat(fd).st_size
            if size > limit:
                raise OSError(errno.EFBIG, f"{size} bytes long, limit {limit}", self.path)
            yield lambda offset, nbytes: os.pread(fd, nbytes, offset), size
        finally:
            os.close(fd)

    def _refuse_foreign(self, status: os.stat_result, is_trusted: Callable[[int], bool]) -> None:
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or stat.S_IMODE(status.st_mode) & 0o077:
            raise OSError(errno.EPERM, "not a private file", self.path)
        if not is_trusted(status.st_uid):
            raise OSError(errno.EPERM, f"it is of user {status.st_uid}, who may not write the image", self.path)

    def store(self, offset: int, data: bytes) -> None:
        """Put *data*, which lies inside, there. Raises: OSError; what is there already is left alone."""
        if self._map is None:
            self._map = self._create()
        self._map[offset : offset + len(data)] = data

    @property
    def address(self) -> int:
        """Where it lies in memory; 0 before the first `store`, and after `remove` and `close`."""
        if self._map is None:
            return 0
        with ffi.from_buffer(self._map) as view:
            return int(ffi.cast("uintptr_t", view))

    def reserve(self, nbytes: int) -> None:
        """Be so many bytes long, once it is made."""
        assert self._map is None
        self.nbytes = nbytes

    def window(self, offset: int) -> Any:
        """A cffi pointer to what is there, good until it is removed or closed."""
        return ffi.cast("uint8_t *", self.address) + offset

    def _create(self) -> mmap.mmap:
        """All of it is allocated at once, so that no later store can lack space."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self.path, flags, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(fd, 0, self.nbytes)
            mapped = mmap.mmap(fd, self.nbytes)
        except (OSError, MemoryError) as error:
            os.close(fd)
            os.unlink(self.path)
            if isinstance(error, OSError):
                error.filename = self.path
            raise
        self._fd = fd
        return mapped

    @property
    def is_made(self) -> bool:
        """Whether this process has stored something."""
        return self._map is not None

    @property
    def is_lost(self) -> bool:
        """Whether the next process could not find it: somebody has removed the file."""
        return self._fd >= 0 and os.fstat(self._fd).st_nlink == 0

    def remove(self) -> None:
        """Forget all of it, also what an earlier process left. Raises: OSError if that cannot be."""
        self.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def close(self) -> None:
        """Leave it to the next process; a second time does nothing."""
        if self._map is not None:
            self._map.close()
            self._map = None
            os.close(self._fd)
            self._fd = -1


def is_in_use(path: str) -> bool:
    """Whether the process that made the file at *path* lives. Raises: OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
