"""Where a host keeps link logs: files of a directory named by their tags, and private directories beneath it."""

import contextlib
import fcntl
import glob
import logging
import os
import stat
import tempfile
from collections.abc import Iterator

from qcow2.driver.boot import this_boot
from qcow2.driver.file import HostFile
from qcow2.driver.memory import SharedMemory
from qcow2.plane.linklog import CAPACITY, MAX_CAPACITY, TAG_BITS, LinkLog, Origin

NAME = "qcow2-links-"  # and the tag
PRIVATE = "qcow2-links."  # how the name of a directory of a sandboxed process begins

log = logging.getLogger("qcow2")


def tell_if_no_place(directory: str) -> None:
    """Say if no log can be in *directory*, which is none: who goes on is slower, and a kill says more of bitmaps."""
    if not os.path.isdir(directory):
        text = "is no directory: no link log, so the first write to each cluster of an overlay waits for the disk"
        log.warning("--link-log=%s: %s", directory, text)


def origin_of(file: HostFile) -> Origin:
    """What a log says of the image in *file*."""
    status = os.fstat(file.fd)
    numbers = (status.st_rdev, 0) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)
    return Origin(this_boot(), *numbers, os.fsencode(os.path.abspath(file.path)))


def new_log(file: HostFile, directory: str, *, has_subclusters: bool) -> tuple[LinkLog, SharedMemory]:
    """A log for *file* in *directory*, made when the first link waits; more of them fit if each is of a subcluster."""
    memory = SharedMemory("")
    capacity = MAX_CAPACITY if has_subclusters else CAPACITY

    def renew() -> int:
        with contextlib.suppress(OSError):  # no image names it; who lists logs finds it stale
            if memory.is_made:
                memory.remove()
        tag = int.from_bytes(os.urandom(TAG_BITS // 8), "little") or 1
        memory.path = os.path.join(directory, f"{NAME}{tag:06x}")
        return tag

    return LinkLog(memory, file, origin_of(file), renew(), capacity, renew=renew), memory


def find_log(tag: int, directory: str) -> SharedMemory | None:
    """The log with *tag* in *directory*, or in a private one beneath it or beside it; None if there is none."""
    for place in _places(directory):
        path = os.path.join(place, f"{NAME}{tag:06x}")
        if os.path.lexists(path):
            return SharedMemory(path)
    return None


def all_logs(directory: str) -> list[SharedMemory]:
    """Every log in *directory* and in the private ones."""
    paths = [path for place in _places(directory) for path in glob.glob(os.path.join(glob.escape(place), f"{NAME}*"))]
    return [SharedMemory(path) for path in sorted(paths)]


def remove_log(memory: SharedMemory) -> None:
    """Remove a log, and the private directory that it was the last of. Raises: OSError."""
    memory.remove()
    place = os.path.dirname(memory.path)
    if os.path.basename(place).startswith(PRIVATE):
        _remove_unless_used(place)


def _places(directory: str) -> list[str]:
    parent, name = os.path.split(os.path.abspath(directory))
    root = parent if name.startswith(PRIVATE) else directory
    return [root, *_private_directories(root)]


@contextlib.contextmanager
def private_directory(directory: str) -> Iterator[str]:
    """A directory in *directory* for the logs of this process alone, whom a sandbox will keep from the rest.

    Whoever looks for a log in *directory* looks there, too. It goes at the end, unless it holds a log; so do those that
    killed processes left empty. One that cannot be made is named all the same: no log can be there.
    """
    for left in _private_directories(directory):
        _remove_unless_used(left)
    try:
        path = tempfile.mkdtemp(prefix=PRIVATE, dir=directory)
        os.chmod(path, 0o711)  # others may ask for the log of their image, and learn that there is none
        fd = _lock(path)
    except OSError:
        yield os.path.join(directory, f"{PRIVATE}none")
        return
    try:
        yield path
    finally:
        os.close(fd)
        _remove_unless_used(path)


def _private_directories(directory: str) -> list[str]:
    return glob.glob(os.path.join(glob.escape(directory), f"{PRIVATE}*"))


def _lock(path: str) -> int:
    """A descriptor of the directory *path* that says that it is in use. Raises: OSError if it is."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def _remove_unless_used(path: str) -> None:
    """Remove the directory *path* if it is empty and nobody uses it."""
    with contextlib.suppress(OSError):
        fd = _lock(path)
        try:
            os.rmdir(path)
        finally:
            os.close(fd)
