"""A disk that takes its time: a control group whose writes to it, while they are held, hardly get on.

In the first version of control groups that means O_DIRECT: the writeback of the page cache is the kernel's own.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BYTES, OPERATIONS = 16 << 10, 4  # a second
ROOT = Path("/sys/fs/cgroup")


class NoThrottle(Exception):
    """This host cannot slow a disk down for us; one line says why."""


class Throttle:
    """What runs `under` it has its writes to *disk*, "major:minor", held; *group* is a control group."""

    def __init__(self, group: Path, disk: str) -> None:
        self._group = group
        self._disk = disk
        self.under = ("sh", "-c", f'echo $$ > {group / "cgroup.procs"} && exec "$@"', "sh")

    def hold(self) -> None:
        self._limit(BYTES, OPERATIONS)

    def let_go(self) -> None:
        """What is under way goes on at full speed."""
        self._limit(None, None)

    def _limit(self, nbytes: int | None, operations: int | None) -> None:
        if _is_first():
            (self._group / "blkio.throttle.write_bps_device").write_text(f"{self._disk} {nbytes or 0}")
            (self._group / "blkio.throttle.write_iops_device").write_text(f"{self._disk} {operations or 0}")
        else:
            limits = f"{self._disk} wbps={nbytes or 'max'} wiops={operations or 'max'}"
            (self._group / "io.max").write_text(limits)


def _is_first() -> bool:
    return (ROOT / "blkio").is_dir()


@contextmanager
def throttle(directory: Path) -> Iterator[Throttle]:
    """A throttle of the disk that *directory* is on, not held.

    Raises: NoThrottle.
    """
    disk = _disk_of(directory)
    group = ROOT / ("blkio" if _is_first() else "") / f"kill-{os.getpid()}"
    try:
        if not _is_first():
            (ROOT / "cgroup.subtree_control").write_text("+io")
        group.mkdir()
    except OSError as error:
        raise NoThrottle(f"no slow disk: {error}") from error
    try:
        yield Throttle(group, disk)
    finally:
        group.rmdir()


def _disk_of(directory: Path) -> str:
    """The whole disk: groups know no partitions."""
    device = os.stat(directory).st_dev
    node = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not node.exists():
        raise NoThrottle(f"no slow disk: {directory} lies on none")
    node = node.resolve()
    return ((node.parent if (node / "partition").exists() else node) / "dev").read_text().strip()
