"""Give an image another backing file."""

from contextlib import ExitStack

from qcow2.driver.file import run
from qcow2.driver.operation import File
from qcow2.driver.pool import PoolDriver
from qcow2.engine.image import Image
from qcow2.engine.opened import OpenOptions
from qcow2.error import ImageError
from qcow2.format.header import clear_autoclear, header_over, read_header, require_uncorrupted, rewrite_header
from qcow2.format.layout import Autoclear
from qcow2.job.crew import WIDTH
from qcow2.job.pace import Pace
from qcow2.job.rebase import copy_difference
from qcow2.library.disk import Disk, open_disk
from qcow2.library.hostfile import is_at, is_same_file
from qcow2.library.key import Key, keys_of
from qcow2.library.own_thread import undisturbed
from qcow2.node.chain import Chain
from qcow2.node.gate import backing_path
from qcow2.node.node import Node


async def change_header(file: File, name: str | None, backing_format: str | None) -> None:
    """Let the header name another backing file; stable on return. Raises: OSError, ImageError; it is as it was then."""
    header = await read_header(file)
    require_uncorrupted(file, header)
    header_over(file, header, name, backing_format)  # refuse what cannot be before anything is written
    # Bitmaps stay true: no cluster changes. What else promises something, we cannot know.
    header = await clear_autoclear(file, header, maintained=Autoclear.BITMAPS)
    await rewrite_header(file, header.with_backing(name, backing_format))


def rebase_image(
    path: str,
    name: str | None,
    backing_format: str | None,
    pace: Pace,
    *,
    is_compressed: bool = False,
    key: Key = None,
) -> None:
    """Let the image at *path* be over the file *name*, or none, and show what it shows now; stable on return.

    Raises: OSError, ImageError, Cancelled; it is over the old one then.
    """
    with ExitStack() as stack:
        disk = open_disk(path, writable=True, key=key)
        stack.push(lambda kind, value, traceback: disk.close() if kind else disk.abandon())
        image = disk.image
        assert isinstance(image, Image)
        image.refuse_snapshots()
        if is_compressed:
            image.require_compressible()
        new = None
        if name is not None and backing_format is not None:
            chain = stack.enter_context(Chain())
            below = backing_path(path, name)
            _refuse_itself(below, disk)
            new = chain.open(below, backing_format, OpenOptions(keys=keys_of(key)))
            chain.require_room()
        header_over(image.file, image.header, name, backing_format)  # refuse what does not fit
        bring_over(disk, image, new, pace, is_compressed=is_compressed)
        run(change_header(image.file, name, backing_format))


def bring_over(disk: Disk, image: Image, new: Node | None, pace: Pace, *, is_compressed: bool = False) -> None:
    """Write to *image* what shows through it now and would not with *new* under it; *disk* is clean then."""

    def work() -> None:
        with PoolDriver(WIDTH) as driver:
            driver.run(copy_difference(image, new, pace, is_same_file=is_same_file, is_compressed=is_compressed))

    undisturbed(work, pace)
    disk.clean()  # law 6: all that the new chain needs is stable


def _refuse_itself(below: str, disk: Disk) -> None:
    if is_at(disk.files[0], below):
        raise ImageError(disk.files[0].path, "an image cannot be its own backing file")
