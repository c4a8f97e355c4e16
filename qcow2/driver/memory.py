"""Shared memory that outlives the process: a file of a memory file system, reached by a name that others can guess.

So whatever is found there is input: it must be a plain file of our own that nobody else may write.
"""

import contextlib
import errno
import mmap
import os
import stat

from qcow2.native import ffi

DEFAULT_DIRECTORY = "/dev/shm"


class SharedMemory:
    """The file at *path*, of *nbytes*, made when it is first stored to. Its user holds a lock that keeps others off."""

    def __init__(self, path: str, nbytes: int) -> None:
        self.path = path
        self.nbytes = nbytes
        self._map: mmap.mmap | None = None

    def load(self) -> bytes:
        """What an earlier process left there; empty if it left nothing.

        Raises: OSError, EPERM if what is there is not what we could have left.
        """
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return b""
        try:
            self._refuse_foreign(os.fstat(fd))
            return os.pread(fd, self.nbytes, 0)
        finally:
            os.close(fd)

    def _refuse_foreign(self, status: os.stat_result) -> None:
        mode = status.st_mode
        is_private = status.st_uid == os.geteuid() and status.st_nlink == 1 and not stat.S_IMODE(mode) & 0o077
        if not (stat.S_ISREG(mode) and is_private):
            raise OSError(errno.EPERM, "not a private file of this user", self.path)

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

    def _create(self) -> mmap.mmap:
        """All of it is allocated at once, so that no later store can lack space."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self.path, flags, 0o600)
        try:
            os.posix_fallocate(fd, 0, self.nbytes)
            return mmap.mmap(fd, self.nbytes)
        except OSError as error:
            os.unlink(self.path)
            error.filename = self.path
            raise
        finally:
            os.close(fd)

    @property
    def is_made(self) -> bool:
        """Whether this process has stored something."""
        return self._map is not None

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
