"""A disk as a file: what `io`, `shutil`, `tarfile` and others that want one can read and write."""

import errno
import io
import os
from operator import index
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from qcow2.library.disk import Disk


class DiskFile(io.RawIOBase):
    """A position in *disk*; closing it leaves the disk open. Any number may be open, on any thread.

    `flush` makes what was written survive a power loss. The length is fixed: of what does not fit nothing is written.
    """

    def __init__(self, disk: "Disk") -> None:
        self._disk = disk
        self._position = 0

    @property
    def name(self) -> str:
        """Of the image file."""
        return self._disk.files[0].path

    @property
    def mode(self) -> str:
        """As `open` has it."""
        return "rb+" if self.writable() else "rb"

    def readable(self) -> bool:
        """Always."""
        return True

    def writable(self) -> bool:
        """Whether the disk was opened for writing."""
        return not self._disk.image.read_only

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to *offset* from the start, from here or from the end; past the end there is nothing.

        Raises: ValueError for a position before the start.
        """
        self._require_open()
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._disk.size}.get(whence)
        if base is None or base + index(offset) < 0:
            raise ValueError(f"seek to {offset} with whence {whence} is not a position on the disk")
        self._position = base + index(offset)
        return self._position

    def tell(self) -> int:
        """Where the next byte is read or written."""
        self._require_open()
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill *buffer* as far as the disk reaches; how many bytes that were, 0 at its end."""
        self._require_open()
        view = memoryview(buffer).cast("B")
        nbytes = max(0, min(len(view), self._disk.size - self._position))
        self._disk.readinto(self._position if nbytes else 0, view[:nbytes])
        self._position += nbytes
        return nbytes

    def readall(self) -> bytes:
        """What is left of the disk, at once."""
        self._require_open()
        start = min(self._position, self._disk.size)
        content = self._disk.read(start, self._disk.size - start)
        self._position = max(self._position, start + len(content))
        return content

    def write(self, data: Any) -> int:
        """Write *data*; how many bytes that were: all, for `shutil` and `tarfile` do not count.

        Raises: OSError(ENOSPC) if it ends past the end of the disk, and nothing is written; OSError(EBADF) if the disk
        is read-only.
        """
        self._require_open()
        if not self.writable():
            raise io.UnsupportedOperation(errno.EBADF, "the disk is read-only", self.name)
        view = memoryview(data).cast("B")
        nbytes = len(view)
        if nbytes and self._position + nbytes > self._disk.size:
            text = f"{nbytes} bytes at {self._position} do not fit, the disk ends at {self._disk.size}"
            raise OSError(errno.ENOSPC, text, self.name)
        self._disk.write(self._position if nbytes else 0, view)
        self._position += nbytes
        return nbytes

    def truncate(self, size: int | None = None) -> int:
        """The length is fixed. Raises: UnsupportedOperation unless *size* is what it is; see `Disk.resize`."""
        wanted = self._position if size is None else size
        if wanted != self._disk.size:
            raise io.UnsupportedOperation(f"a disk of {self._disk.size} bytes cannot be truncated to {wanted}")
        return wanted

    def flush(self) -> None:
        """Make what was written survive a power loss, which a disk that is closed has done."""
        if not self.closed and self.writable() and self._disk.files[0].is_open:
            self._disk.flush()

    def __repr__(self) -> str:
        return f"<qcow2 file of {self._disk!r}, {'closed' if self.closed else f'at {self._position}'}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} can be neither copied nor pickled")

    def _require_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")
