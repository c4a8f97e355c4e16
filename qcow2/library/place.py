"""Where the bytes of a file are: all nodes of a block device have the same ones, a loop device those of its file.

A partition has some of its disk's. What a device mapper makes of others is a device of its own here.
"""

import os
import stat
import struct
from contextlib import suppress
from dataclasses import dataclass
from fcntl import ioctl
from pathlib import Path

END = 1 << 64  # of what goes as far as its file does
SECTOR_SIZE = 512  # of what the kernel says of partitions, whatever the device has
LOOP_GET_STATUS64 = 0x4C05
LOOP_INFO64 = struct.Struct("=3Q208x")  # lo_device, lo_inode, lo_rdevice, and what is of no interest here


@dataclass(frozen=True, slots=True)
class Place:
    """A range of a file or of a block device."""

    identity: tuple[int, ...]  # the numbers of a device; those of a file, and of the device it is on
    start: int = 0
    end: int = END

    def overlaps(self, other: "Place") -> bool:
        """Whether what is written to one may change the other."""
        return self.identity == other.identity and self.start < other.end and other.start < self.end

    def part(self, offset: int, nbytes: int) -> "Place":
        """What begins *offset* bytes into it."""
        start = self.start + offset
        return Place(self.identity, start, min(self.end, start + nbytes))


def place_of(file: str | int) -> Place:
    """Where the bytes of *file*, a path or a descriptor, are. Raises: OSError."""
    status = os.stat(file)
    if not stat.S_ISBLK(status.st_mode):
        return Place((status.st_dev, status.st_ino))
    try:
        return _place_of_device(status.st_rdev, file)
    except OSError:  # a sandbox shows nothing of what is below
        return Place((status.st_rdev,))


def _place_of_device(number: int, node: str | int | None = None) -> Place:
    """That of a partition is on its disk, that of a loop device in its file; *node* is one of the device, or on it."""
    directory = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if (directory / "partition").exists():
        start, nsectors = (_number_in(directory / name) for name in ("start", "size"))
        major, minor = (directory / "../dev").read_text().split(":")
        disk = _place_of_device(os.makedev(int(major), int(minor)), node)
        return disk.part(start * SECTOR_SIZE, nsectors * SECTOR_SIZE)
    loop = directory / "loop"
    if loop.exists() and (below := _below_loop(loop, node)) is not None:
        return below.part(_number_in(loop / "offset"), _number_in(loop / "sizelimit") or END)
    return Place((number,))


def _number_in(path: Path) -> int:
    return int(path.read_text())


def _below_loop(loop: Path, node: str | int | None) -> Place | None:
    """Where its file is; None if that cannot be known here."""
    if node is not None:
        with suppress(OSError):  # who may not open the device, or ask it
            return _told_below(node)
    with suppress(OSError):  # its name is gone, or was one elsewhere
        return place_of(os.fsdecode((loop / "backing_file").read_bytes().removesuffix(b"\n")))
    return None


def _told_below(node: str | int) -> Place:
    """What the device says of its file, whatever that is called by now. Raises: OSError."""
    fd = node if isinstance(node, int) else os.open(node, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        device, inode, number = LOOP_INFO64.unpack(ioctl(fd, LOOP_GET_STATUS64, bytes(LOOP_INFO64.size)))
    finally:
        if fd != node:
            os.close(fd)
    return _place_of_device(number) if number else Place((device, inode))
