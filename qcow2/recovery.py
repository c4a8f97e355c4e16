"""Where a host keeps the link log of an image, and what is done with one that a killed process left there."""

import logging
import os
import stat
import uuid
from pathlib import Path

from qcow2.driver.file import HostFile, run
from qcow2.driver.memory import SharedMemory
from qcow2.linklog import LOG_BYTES, LinkLog
from qcow2.replay import replay

log = logging.getLogger("qcow2")


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


def new_log(file: HostFile, memory: SharedMemory) -> LinkLog:
    """A log for *file* in *memory*, made when the first link waits."""
    tag = 0
    while not tag:
        tag = int.from_bytes(os.urandom(4), "little")
    return LinkLog(memory, identity(file), tag)


def recover(file: HostFile, directory: str) -> None:
    """Bring the links that a killed process left waiting into the image in *file*, locked for writing.

    Says what could not be kept. Raises: OSError if they cannot be written, the log stays then; ImageError.
    """
    memory = link_memory(file, directory)
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
