"""A disk that takes its time: a control group whose O_DIRECT writes get so many bytes and operations a second.

What a killed daemon has under way then ends seconds after it. The first version of control groups lets writes through
the page cache pass at full speed.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BYTES, OPERATIONS = 1 << 20, 100  # a second
ROOT = Path("/sys/fs/cgroup")


class NoThrottle(Exception):
    """This host cannot slow a disk down for us; one line says why."""


@contextmanager
def throttled(directory: Path) -> Iterator[tuple[str, ...]]:
    """A command that runs another one with slow writes to the disk under *directory*.

    Raises: NoThrottle.
    """
    is_first = (ROOT / "blkio").is_dir()
    group = ROOT / ("blkio" if is_first else "") / f"kill-{os.getpid()}"
    try:
        if not is_first:
            (ROOT / "cgroup.subtree_control").write_text("+io")
        group.mkdir()
    except OSError as error:
        raise NoThrottle(f"no slow disk: {error}") from error
    try:
        (_limit_first if is_first else _limit_second)(group, _disk_of(directory))
        yield "sh", "-c", f'echo $$ > {group / "cgroup.procs"} && exec "$@"', "sh"
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


def _limit_first(group: Path, disk: str) -> None:
    (group / "blkio.throttle.write_bps_device").write_text(f"{disk} {BYTES}")
    (group / "blkio.throttle.write_iops_device").write_text(f"{disk} {OPERATIONS}")


def _limit_second(group: Path, disk: str) -> None:
    (group / "io.max").write_text(f"{disk} wbps={BYTES} wiops={OPERATIONS}")
