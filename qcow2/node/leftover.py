"""Names that files have before they get their own, and what goes of those that a death has left.

Each is `.NAME.what` beside the file that is to be NAME, or that is served as NAME.
"""

import ctypes
import errno
import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass

from qcow2.driver.file import HostFile
from qcow2.format import layout
from qcow2.lock import is_written, lock_image
from qcow2.node.recovery import remove_logs_of

WHAT = ("overlay", "pivot", "mirror", "backup")
AT_FDCWD = -100
RENAME_NOREPLACE = 1
HEADS = (layout.MAGIC.to_bytes(4, "big"), bytes(4))  # of an image, and of one whose magic comes last
VERSIONS = (b"\0\0\0\2", b"\0\0\0\3")
COMMITTING = "committing"  # IMAGE.committing, or with a number: what a commit freezes, and removes at its end
COPY = re.compile(r"\..+\.(mirror|backup)")


def hidden(path: str, what: str) -> str:
    """What a file is called that is to be, or to replace, *path*."""
    directory, base = os.path.split(path)
    return os.path.join(directory, f".{base}.{what}")


def require_own_name(path: str) -> None:
    """Whether a file called *path* may stay. Raises: ValueError if it has no name, or one of those that we remove."""
    base = os.path.basename(path)
    if not base:
        raise ValueError(f"{path!r} is not the name of a file")
    if any(base.startswith(".") and base.endswith(f".{what}") and len(base) > len(what) + 2 for what in WHAT):
        raise ValueError(f"{base!r}: files of such names are taken for what a death left, and removed")


def require_lasting_name(path: str) -> None:
    """The same, of a file that no commit is to remove either. Raises: ValueError."""
    require_own_name(path)
    base = os.path.basename(path)
    if base.rstrip("0123456789").endswith(f".{COMMITTING}"):
        raise ValueError(f"{base!r}: files of such names are taken for what a commit has frozen, and removed")


def give_name(name: str, path: str) -> None:
    """Let what is at *name* be at *path*, too, or, where files have one name only, there alone.

    Raises: OSError, FileExistsError if something is there.
    """
    try:
        os.link(name, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
            raise
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.renameat2(AT_FDCWD, os.fsencode(name), AT_FDCWD, os.fsencode(path), RENAME_NOREPLACE) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), name, None, path) from None


def numbers_of(status: os.stat_result) -> tuple[int, int]:
    """Device and inode: which file it is, whatever its name."""
    return status.st_dev, status.st_ino


@dataclass(frozen=True, slots=True)
class Named:
    """A file that has been given the name *path*."""

    path: str
    numbers: tuple[int, int]

    def remove(self) -> None:
        """Take the name away, unless others have, or have given it to another file. Raises: OSError."""
        with suppress(FileNotFoundError):
            if numbers_of(os.lstat(self.path)) == self.numbers:
                os.unlink(self.path)


def require_ours(name: str) -> None:
    """Whether nothing is at *name*, or a file, as a death of ours leaves one. Raises: FileExistsError."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(name).st_mode):
            raise _in_the_way(name)


def _require_left(file: HostFile, name: str, *, is_over: bool = False) -> None:
    """Whether a death of ours may have left *file* at *name*: it is an image, or its first sector was to come last.

    *is_over*: an image names a file under it. A second name of a file may always go.
    Raises: FileExistsError, OSError.
    """
    if not _is_begun(file, is_over=is_over):
        raise _in_the_way(name)


def require_copy_left(file: HostFile, name: str, image_format: str) -> None:
    """Whether a copy of *image_format* may take the place of *file*, which is locked for us, at *name*.

    A raw copy takes that of any: what a death leaves of one begins as the guest wrote it.
    Raises: FileExistsError, OSError.
    """
    if image_format != "raw" and not _is_begun(file):
        raise FileExistsError(errno.EEXIST, "is in the way, and may be a copy of ours: move or remove it", name)


def _is_begun(file: HostFile, *, is_over: bool = False) -> bool:
    """Whether it is an image, with *is_over* over another, or was to get its first sector last, or has two names."""
    head = os.pread(file.fd, layout.SECTOR_SIZE, 0)
    is_image = head[:4] in HEADS and head[4:8] in VERSIONS and (any(head[8:16]) or not is_over)
    return is_image or not any(head) or os.fstat(file.fd).st_nlink != 1


def _looked_at(name: str, path: str) -> HostFile:
    """The file at *name*, whose log names it *path*. Raises: OSError."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return HostFile(path, os.open(name, flags), writable=False)


def _in_the_way(name: str) -> FileExistsError:
    return FileExistsError(errno.EEXIST, "is in the way, and no file that we leave", name)


def remove_overlay(path: str, log_directory: str) -> None:
    """Remove the overlay that a process made which died before that had the name *path*, and its link log.

    The image at *path* is locked for us: nobody else makes one. Raises: OSError, ImageLocked if somebody uses it.
    """
    name = hidden(os.path.realpath(path), "overlay")
    require_ours(name)
    with suppress(FileNotFoundError), _looked_at(name, path) as left:
        _require_left(left, name, is_over=True)
        if os.fstat(left.fd).st_nlink == 1:  # else it is the image itself, after a snapshot that was called off
            lock_image(left.fd, name, writable=True)
            remove_logs_of(left, log_directory)
    with suppress(FileNotFoundError):
        os.unlink(name)


def remove_pivot(path: str) -> None:
    """Remove what was to replace *path*, the same way: a second name of a copy, or a link to it.

    Raises: OSError, FileExistsError if it is none of these.
    """
    name = hidden(os.path.abspath(path), "pivot")
    with suppress(FileNotFoundError):
        if not os.path.islink(name):
            require_ours(name)
            with _looked_at(name, name) as left:
                _require_left(left, name)
        os.unlink(name)


def remove_leftovers(path: str, log_directory: str) -> None:
    """Remove what has died beside the image at *path*, which is locked for us; what cannot go stays."""
    with suppress(OSError):
        if os.path.lexists(hidden(os.path.realpath(path), "overlay")):
            remove_overlay(path, log_directory)
    with suppress(OSError):
        if not _is_last_name(hidden(os.path.abspath(path), "pivot")):
            remove_pivot(path)


def _is_last_name(name: str) -> bool:
    """Whether a file would be gone with it. Raises: OSError."""
    status = os.lstat(name)
    return not stat.S_ISLNK(status.st_mode) and status.st_nlink < 2


def copies_left(path: str) -> list[str]:
    """The copies beside the image at *path* that are not whole, and that nobody writes: a death has left them.

    They may be of another image's, so they stay. Raises: OSError if the directory cannot be read.
    """
    directory = os.path.dirname(os.path.realpath(path))
    names = [os.path.join(directory, name) for name in sorted(os.listdir(directory)) if COPY.fullmatch(name)]
    return [name for name in names if _is_left(name)]


def _is_left(name: str) -> bool:
    with suppress(OSError):
        with _looked_at(name, name) as file:
            status = os.fstat(file.fd)
            return stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and not is_written(file.fd, name)
    return False
