"""Copy disks to new images from Python."""

from contextlib import ExitStack
from dataclasses import dataclass

from qcow2.driver.file import HostFile
from qcow2.driver.pool import PoolDriver
from qcow2.engine.create import Options
from qcow2.engine.opened import OpenOptions
from qcow2.error import ImageError
from qcow2.format.layout import CompressionType
from qcow2.job.blame import CopyFailed
from qcow2.job.copy import Manner, copy
from qcow2.job.crew import WIDTH
from qcow2.job.newcompressed import NewCompressedImage
from qcow2.job.newimage import NewImage
from qcow2.job.pace import Pace
from qcow2.job.source import Source
from qcow2.job.target import InPlace, Target
from qcow2.library.hostfile import created, is_at
from qcow2.library.key import Key, keys_of
from qcow2.library.own_thread import undisturbed
from qcow2.node.chain import Chain
from qcow2.node.raw import RawImage


@dataclass(frozen=True, slots=True)
class Conversion:
    """What is copied, and what it becomes."""

    source_format: str
    target_format: str
    snapshot: str | None  # of the source; None: what it holds now
    is_compressed: bool
    compression: CompressionType
    level: int | None  # of the compression; None: as zlib and zstd have it
    cluster_bits: int
    key: Key  # of the source


def convert_image(source: str, target: str, pace: Pace, wanted: Conversion) -> None:
    """Let *target* be a new image with the disk of *source*; stable on return.

    Raises: OSError, ImageError, ValueError, Cancelled; a new file is gone then, another one no image.
    """
    with ExitStack() as stack:
        chain = stack.enter_context(Chain(needs_all=True))
        image = chain.open(
            source, wanted.source_format, OpenOptions(snapshot=wanted.snapshot, keys=keys_of(wanted.key))
        )
        for link in image.chain:
            if is_at(link.file, target) or is_at(link.data_file, target):
                raise ImageError(target, "the target is the source, or under it")
        file = stack.enter_context(created(target))
        options = Options(size=image.size, cluster_bits=wanted.cluster_bits, compression=wanted.compression)
        into: Target
        if wanted.target_format == "raw":
            into = _raw(file, image.size)
        elif wanted.is_compressed:
            into = NewCompressedImage(file, options, level=wanted.level, reads_zeros=not file.is_device)
        else:
            into = NewImage(file, options, reads_zeros=not file.is_device)
        driver = stack.enter_context(PoolDriver(WIDTH))
        try:
            undisturbed(lambda: driver.run(copy(Source.of(image), into, pace, Manner())), pace)
        except CopyFailed as failure:
            raise failure.__cause__ or failure from None


def _raw(file: HostFile, size: int) -> InPlace:
    if file.is_device:
        if file.size() < size:
            raise ImageError(file.path, f"the device has {file.size()} bytes, the disk {size}")
    else:
        file.set_length(0)
    return InPlace(RawImage(file, size, read_only=False), size, is_zero=not file.is_device, length=size)
