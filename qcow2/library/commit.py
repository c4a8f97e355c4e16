"""Commit an overlay on the disk of this host: the base opened for writing beside it, emptied in the right order."""

import os

from qcow2.driver.file import run
from qcow2.driver.memory import DEFAULT_DIRECTORY
from qcow2.driver.pool import PoolDriver
from qcow2.engine.image import Image
from qcow2.engine.opened import OpenOptions
from qcow2.error import ImageError
from qcow2.job.commit import commit
from qcow2.job.crew import WIDTH
from qcow2.job.pace import Pace
from qcow2.library.disk import Disk
from qcow2.library.key import Key, keys_of
from qcow2.library.own_thread import undisturbed
from qcow2.node.chain import Chain, chain_paths
from qcow2.node.gate import backing_path


class NoBacking(ImageError):
    """There is nothing to commit to."""

    def __init__(self, path: str) -> None:
        super().__init__(path, "the image does not have a backing file")


class NotInChain(ImageError):
    """The base that was asked for is not under the image."""

    def __init__(self, path: str, base: str) -> None:
        super().__init__(path, f"did not find {base!r} in the backing chain")


def commit_image(
    path: str,
    base: str | None,
    pace: Pace,
    *,
    empties: bool = True,
    image_format: str = "qcow2",
    log_directory: str = DEFAULT_DIRECTORY,
    discard_log: bool = False,
    key: Key = None,
) -> None:
    """Bring what the image at *path* has into *base*, one of the files under it; None is the one right under it.

    Stable on return. *empties*: the image has nothing of its own then, if *base* is right under it. What lies between
    the two is worth nothing any more, but through the image.
    Raises: OSError, ImageError, ValueError, Cancelled; what the image shows is as before.
    """
    disk = open_to_commit(
        path, base, image_format=image_format, log_directory=log_directory, discard_log=discard_log, key=key
    )
    commit_opened(disk, pace, empties=empties)


def open_to_commit(
    path: str,
    base: str | None,
    *,
    image_format: str = "qcow2",
    log_directory: str = DEFAULT_DIRECTORY,
    discard_log: bool = False,
    key: Key = None,
) -> Disk:
    """The image at *path*, with *base* writable under it. Raises: OSError, ImageError."""
    depth = depth_of(path, image_format, base)
    chain = Chain(log_directory=log_directory, discard_log=discard_log, writable_depth=depth)
    return Disk.of(chain, path, image_format, OpenOptions(writable=True, keys=keys_of(key)))


def commit_opened(disk: Disk, pace: Pace, *, empties: bool = True) -> None:
    """Do what `commit_image` does with what `open_to_commit` has opened, and close it. Raises: as `commit_image`."""
    with disk:
        overlay, depth = disk.image, disk.chain.writable_depth
        assert isinstance(overlay, Image)
        below = disk.chain.nodes[depth]

        def work() -> None:
            try:
                with PoolDriver(WIDTH) as driver:
                    driver.run(commit(overlay, below, pace))
            finally:
                run(below.close())
            if empties and depth == 1:
                run(overlay.empty())

        undisturbed(work, pace)


def depth_of(path: str, image_format: str, base: str | None) -> int:
    """Where in the chain of *path* the file *base* is; relative names start at the image's directory, as with QEMU."""
    below = chain_paths(path, image_format)[1:]
    if not below:
        raise NoBacking(path)
    if base is None:
        return 1
    wanted = backing_path(path, base)
    for depth, each in enumerate(below, 1):
        if each == wanted or (os.path.exists(wanted) and os.path.exists(each) and os.path.samefile(each, wanted)):
            return depth
    raise NotInChain(path, base)
