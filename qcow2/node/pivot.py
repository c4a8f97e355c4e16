"""Where a copy of a disk lies, and how the path that is served comes to lead to it.

A new copy has the name it was wanted under only once it is whole. The path is turned in one step: who opens it after a
death at any point finds the disk that was served, or its copy.
"""

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress

from qcow2.driver.file import HostFile
from qcow2.error import UnsupportedImage
from qcow2.lock import lock_image
from qcow2.node.leftover import (
    give_name,
    hidden,
    numbers_of,
    remove_pivot,
    require_copy_left,
    require_lasting_name,
    require_ours,
)
from qcow2.node.overlay import leads_to, open_directory, sync_directory
from qcow2.node.ownership import own_as
from qcow2.node.recovery import remove_logs_of


class NewFile:
    """A file that shall be at *path*, and is at `temporary` until then."""

    def __init__(self, path: str, log_directory: str, image_format: str) -> None:
        """*log_directory* is where the link log of an image in it lies, which goes with it.

        Raises: FileExistsError if something is there; ValueError if nothing can be.
        """
        self.path = path
        self._log_directory = log_directory
        self._image_format = image_format
        require_lasting_name(path)
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        os.stat(os.path.dirname(path) or ".")
        self.temporary = hidden(path, "mirror")
        self._made: tuple[int, int] | None = None  # device and inode

    def make(self, like: HostFile, fill: Callable[[HostFile], None]) -> None:
        """Make it anew with the owner and mode of *like*, and what *fill* writes. Raises: OSError, ImageError."""
        self.discard()
        self._remove_leftover()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with HostFile(self.temporary, os.open(self.temporary, flags, 0o600), writable=True) as file:
            self._made = numbers_of(os.fstat(file.fd))
            try:
                own_as(file, like)
                fill(file)
            except BaseException:
                self.discard()
                raise

    def _remove_leftover(self) -> None:
        """Of a process that died, or of ours. Raises: ImageLocked if somebody uses it; FileExistsError."""
        require_ours(self.temporary)
        with suppress(FileNotFoundError), HostFile.open(self.temporary, writable=True) as file:
            lock_image(file.fd, self.temporary, writable=True)
            require_copy_left(file, self.temporary, self._image_format)
            self._unlink(self.temporary)

    def _unlink(self, path: str) -> None:
        """Take the name *path* away, and the log that was made for it, which no other file names."""
        with HostFile(
            self.temporary, os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), writable=False
        ) as left:
            if os.fstat(left.fd).st_nlink == 1:  # else it has its own name, too, and is whole
                remove_logs_of(left, self._log_directory)
        os.unlink(path)

    def name(self) -> None:
        """Give it the name that was wanted; stable on return. Raises: OSError, FileExistsError."""
        if not self._is_at(self.path):
            self._link()
        if self._is_at(self.temporary):
            os.unlink(self.temporary)
        sync_directory(self.path)  # once more, too: the last one may have failed

    def _link(self) -> None:
        if not self._is_at(self.temporary):
            raise FileNotFoundError(errno.ENOENT, "the copy has been moved or removed", self.temporary)
        if os.path.lexists(self.path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self.path)
        give_name(self.temporary, self.path)

    def unname(self) -> None:
        """Let it be at `temporary` alone, as before `name`; stable on return. Raises: OSError."""
        if not self._is_at(self.path):
            return
        if not self._is_at(self.temporary):
            give_name(self.path, self.temporary)
        if self._is_at(self.path):
            os.unlink(self.path)
        sync_directory(self.path)

    @property
    def place(self) -> str:
        """Where it is now. Raises: OSError."""
        return self.path if self._is_at(self.path) else self.temporary

    def is_led_to_by(self, path: str) -> bool:
        """Whether *path* leads to what was made. Raises: OSError."""
        try:
            return numbers_of(os.stat(path)) == self._made
        except FileNotFoundError:
            return False

    def discard(self) -> None:
        """Remove what was made, whichever name it has. Raises: OSError."""
        for path in (self.temporary, self.path):
            if self._is_at(path):
                self._unlink(path)

    def _is_at(self, path: str) -> bool:
        try:
            return numbers_of(os.lstat(path)) == self._made
        except FileNotFoundError:
            return False


class Pivot:
    """The path *served*, where the file *top* is, is about to lead to *target*.

    `prepare`, then `switch`, then `sync`; or, before `switch`, `discard`.
    """

    def __init__(self, served: str, top: HostFile, target: str, copy: HostFile) -> None:
        """*copy* is what shall be at *target*. Raises: UnsupportedImage, OSError if that cannot be."""
        require_turnable(served, top)
        require_there(target, copy)
        self._served = served
        self._top = top
        self._copy = copy
        self._target = os.path.realpath(target)
        directory, base = os.path.split(os.path.abspath(served))
        self._temporary = hidden(os.path.abspath(served), "pivot")
        self._old = None if os.path.islink(served) else _free_name(os.path.join(directory, f"{base}.old"), top)
        self._is_at_hand = False
        self._was_named = False
        self._directory_fd = -1  # of both names

    def prepare(self) -> None:
        """Give what is served a name that it keeps, stable on return, and have the new one at hand. Raises: OSError."""
        remove_pivot(self._served)  # of a process that died in between
        self._point(self._temporary)
        self._is_at_hand = True
        if self._old is not None and not os.path.lexists(self._old):
            os.link(self._served, self._old)
            self._was_named = True
        self._directory_fd = open_directory(self._temporary)  # once the path is turned its sync must not lack that
        os.fsync(self._directory_fd)

    def _point(self, name: str) -> None:
        """A second name in the same directory, which a sandbox lets us give; elsewhere a symbolic link."""
        is_beside = os.path.samefile(os.path.dirname(self._target), os.path.dirname(name))
        if is_beside and os.path.isfile(self._target):
            os.link(self._target, name)
        else:
            os.symlink(self._target, name)

    def switch(self) -> None:
        """Let the path lead to the target. Raises: OSError, and then nothing has changed."""
        try:
            os.rename(self._temporary, self._served)
        except OSError:  # a network file system may have done it, and say that it has not
            if not self._is_turned():
                raise
        self._was_named = False

    def _is_turned(self) -> bool:
        with suppress(OSError):
            return os.path.samestat(os.stat(self._served), os.fstat(self._copy.fd))
        return False

    def sync(self) -> None:
        """Make that stable. Raises: OSError."""
        try:
            os.fsync(self._directory_fd)
        finally:
            self._close()

    def _close(self) -> None:
        fd, self._directory_fd = self._directory_fd, -1
        if fd >= 0:
            os.close(fd)

    def discard(self) -> None:
        """Let all be as it was; what a rename has done that says it failed, stays. Raises: OSError."""
        self._close()
        if self._is_at_hand:
            with suppress(FileNotFoundError):
                os.unlink(self._temporary)
        if self._was_named and self._old is not None and leads_to(self._served, self._top):
            os.unlink(self._old)


def require_turnable(served: str, top: HostFile) -> None:
    """Whether the path *served*, where *top* is, can lead elsewhere. Raises: UnsupportedImage, OSError."""
    if not stat.S_ISREG(os.stat(served).st_mode):
        raise UnsupportedImage(served, "not a regular file: its path cannot lead elsewhere")
    if not os.path.samestat(os.stat(served), os.fstat(top.fd)):
        raise OSError(errno.ESTALE, "another file has this name by now", served)


def require_there(target: str, copy: HostFile) -> None:
    """Raises: OSError unless *target* leads to *copy*."""
    if not os.path.samestat(os.stat(target), os.fstat(copy.fd)):
        raise OSError(errno.ESTALE, "another file has this name by now", target)


def _free_name(path: str, top: HostFile) -> str:
    """*path*, or with a number, where nothing is, or *top* already."""
    name, number = path, 1
    while os.path.lexists(name) and not os.path.samestat(os.lstat(name), os.fstat(top.fd)):
        number += 1
        name = f"{path}{number}"
    return name
