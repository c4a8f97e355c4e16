"""Where the bytes of a file are: two nodes of a block device have the same ones, a loop device those of its file."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

END = 1 << 64  # of what goes as far as its file does


@dataclass(frozen=True, slots=True)
class Place:
    """A range of a file or of a block device."""

    identity: tuple[int, ...]  # the numbers of a device; those of a file, and of the device it is on
    start: int
    end: int

    def overlaps(self, other: "Place") -> bool:
        """Whether what is written to one may change the other."""
        return self.identity == other.identity and self.start < other.end and other.start < self.end


def place_of(status: os.stat_result) -> Place:
    """Where the bytes of the file with this *status* are; of a loop device, those of its backing file."""
    if not stat.S_ISBLK(status.st_mode):
        return Place((status.st_dev, status.st_ino), 0, END)
    major, minor = os.major(status.st_rdev), os.minor(status.st_rdev)
    loop = Path(f"/sys/dev/block/{major}:{minor}/loop")
    try:
        below = place_of(os.stat((loop / "backing_file").read_bytes().removesuffix(b"\n")))
        offset, limit = (int((loop / name).read_text()) for name in ("offset", "sizelimit"))
    except OSError:  # it is no loop device, or the name of the file is not known here
        return Place((status.st_rdev,), 0, END)
    start = below.start + offset
    return Place(below.identity, start, min(below.end, start + limit) if limit else below.end)
