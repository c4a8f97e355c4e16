"""Where a host keeps the link log of an image, and what is done with one that a killed process left there."""

import contextlib
import fcntl
import glob
import logging
import os
import stat
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from qcow2.driver.file import HostFile, run
from qcow2.driver.memory import SharedMemory
from qcow2.linklog import LOG_BYTES, LinkLog
from qcow2.replay import replay

PRIVATE = "qcow2-links."  # how the name of a directory of a sandboxed process begins

log = logging.getLogger("qcow2")


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


def _found_logs(file: HostFile, directory: str) -> Iterator[SharedMemory]:
    """Where a log of the image in *file* may be: in *directory*, or in a private one beneath it or beside it."""
    parent, name = os.path.split(os.path.abspath(directory))
    root = parent if name.startswith(PRIVATE) else directory
    yield link_memory(file, root)
    for place in _private_directories(root):
        if _is_of_a_keeper(place, file):
            yield link_memory(file, place)


def _is_of_a_keeper(path: str, file: HostFile) -> bool:
    """Whether *path* is a directory of somebody who may keep a log of the image in *file*: anybody can make one."""
    try:
        status = os.lstat(path)
    except OSError:  # gone since
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid in (0, os.geteuid(), os.fstat(file.fd).st_uid)


def link_memory(file: HostFile, directory: str) -> SharedMemory:
    """The shared memory of the image in *file*: one for each inode, whatever its names are."""
    device, inode = _numbers(file)
    return SharedMemory(os.path.join(directory, f"qcow2-links-{device:x}-{inode:x}"), LOG_BYTES)


def identity(file: HostFile) -> bytes:
    """What a log says of its image: on which boot of the host it was which inode."""
    boot = uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    device, inode = _numbers(file)
    return boot.bytes + device.to_bytes(8, "little") + inode.to_bytes(8, "little")


def _numbers(file: HostFile) -> tuple[int, int]:
    status = os.fstat(file.fd)
    return (status.st_rdev, 0) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)


def new_log(file: HostFile, memory: SharedMemory) -> LinkLog | None:
    """A log for *file* in *memory*, made when the first link waits. None, and a word, where no boot id is to be had."""
    try:
        name = identity(file)
    except OSError as error:
        log.warning("%s: no link log: %s: %s", file.path, error.filename, error.strerror)
        return None
    tag = 0
    while not tag:
        tag = int.from_bytes(os.urandom(4), "little")
    return LinkLog(memory, name, tag)


def recover(file: HostFile, directory: str) -> None:
    """Bring the links that a killed process left waiting into the image in *file*, locked for writing.

    Says what could not be kept. Raises: OSError if they cannot be written, the log stays then; ImageError.
    """
    for memory in _found_logs(file, directory):
        _recover(file, memory)


def _recover(file: HostFile, memory: SharedMemory) -> None:
    try:
        content = memory.load()
    except OSError as error:
        log.warning("%s: its link log is not read: %s: %s", file.path, memory.path, error.strerror)
        return
    if not content:
        return
    outcome = run(replay(file, content, identity(file)))
    if outcome.is_void:
        log.warning("%s: another program has written to it: writes that were never flushed are lost", file.path)
    if outcome.dropped:
        log.warning("%s: %d clusters that were never flushed are lost", file.path, outcome.dropped)
    memory.remove()
    if os.path.basename(os.path.dirname(memory.path)).startswith(PRIVATE):
        _remove_unless_used(os.path.dirname(memory.path))
