"""Change what an image is: its version, its refcounts, what it asks of who writes to it.

Each step leaves a whole image that shows the same disk: contents first, while the old header says how to read them,
then one sector of the header.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

from qcow2.driver.file import HostFile, run
from qcow2.driver.memory import DEFAULT_DIRECTORY
from qcow2.driver.operation import File
from qcow2.engine.create import feature_names
from qcow2.engine.image import Image
from qcow2.error import ImageError
from qcow2.format.header import (
    Extension,
    Header,
    clear_autoclear,
    pack_header,
    read_header,
    require_uncorrupted,
    rewrite_header,
    set_lazy_refcounts,
)
from qcow2.format.layout import (
    PROMISES,
    SECTOR_SIZE,
    V2_REFCOUNT_ORDER,
    Autoclear,
    CompressionType,
    ExtensionMagic,
    Incompatible,
)
from qcow2.job.pace import Pace
from qcow2.judge.check import judge
from qcow2.judge.repair import change_width, repair, require_width
from qcow2.judge.report import Report
from qcow2.library.disk import open_disk
from qcow2.library.key import Key
from qcow2.library.own_thread import undisturbed
from qcow2.node.gate import DATA, named_path

STEPS = 3


@dataclass(frozen=True, slots=True)
class Amendment:
    """What an image shall be; None: as it is."""

    size: int | None = None  # not less than now
    version: int | None = None
    lazy_refcounts: bool | None = None
    refcount_order: int | None = None


@dataclass(frozen=True, slots=True)
class DataFileName:
    """What the header shall say of the external data file; None: as it does."""

    name: str | None = None  # "": nothing
    is_raw: bool | None = None  # unless so, it need not be the same disk as a raw image any more


class CannotAmend(ImageError):
    """The image cannot be what it shall be; nothing has changed."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.reason = reason


def amend_image(
    path: str,
    wanted: Amendment,
    pace: Pace,
    *,
    named: DataFileName | None = None,
    first: Callable[[HostFile], None] = lambda file: None,
    log_directory: str = DEFAULT_DIRECTORY,
    discard_log: bool = False,
    key: Key = None,
) -> None:
    """Let the image at *path* be what is *wanted*; stable on return. Its disk is as before, but for the size.

    *first*, given the image file, is called once nothing is in the way and before anything changes. A data file that is
    *named* is the one that gets longer; the header calls it so last. *pace* is told how many steps are done.
    Raises: OSError, ImageError, ValueError, Cancelled, what *first* raises; what was not refused at once may be done in
    part, each part whole.
    """
    data_file = named_path(path, DATA, named.name) if named is not None and named.name else None
    with open_disk(
        path, writable=True, log_directory=log_directory, discard_log=discard_log, key=key, data_file=data_file
    ) as disk:
        image, file = disk.image, disk.files[0]
        assert isinstance(image, Image)
        run(require_amendable(image, wanted, pace))
        if named is not None:
            run(renamed(file, named))
        first(file)
        pace.tell(0, STEPS)
        undisturbed(lambda: run(prepare(image, wanted, pace)), pace)
        disk.clean()
        try:
            pace.tell(1, STEPS)
            undisturbed(lambda: run(amend_header(file, wanted, pace)), pace)
            if named is not None:
                run(name_data_file(file, named))
            pace.tell(STEPS, STEPS)
        finally:
            disk.abandon()  # it is clean, and its header may not be the one it was opened with


async def require_amendable(image: Image, wanted: Amendment, pace: Pace) -> None:
    """Raises: CannotAmend if *image* cannot be what is *wanted*; Cancelled."""
    path, record = image.file.path, image.header.record
    version = wanted.version or record.version
    order = record.refcount_order if wanted.refcount_order is None else wanted.refcount_order
    if wanted.size is not None and wanted.size < image.size:
        raise CannotAmend(path, "a smaller size would lose what is past it; see resize --shrink")
    if version < 3 and wanted.lazy_refcounts:
        text = "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)"
        raise CannotAmend(path, text)
    if version < 3 and order != V2_REFCOUNT_ORDER:
        if record.version < 3 or wanted.refcount_order is not None:
            text = "Refcount widths other than 16 bits require compatibility level 1.1 or above"
            raise CannotAmend(path, f"{text} (use compat=1.1 or greater)")
        raise CannotAmend(path, "compat=0.10 requires refcount_bits=16")
    if wanted.size is not None:
        await image.grown_size(wanted.size)
    if order != record.refcount_order:
        await require_width(image.file, order, lambda done, total: pace.require_going())
    if version < record.version:
        size = image.size if wanted.size is None else wanted.size + -wanted.size % SECTOR_SIZE
        await _require_old_enough(image, size, pace)
    if version > record.version:
        await _require_upgradable(image, version, pace)


async def _require_upgradable(image: Image, version: int, pace: Pace) -> None:
    """Raises: CannotAmend if a newer version would take what is wrong in the image for what it can say; OSError.

    UnsupportedImage if its header has no room.
    """
    report = Report()
    await judge(image.file, report, lambda done, total: pace.require_going())
    if report.unsound:  # bit 0 of an entry, reserved in version 2, says in version 3 that a cluster reads as zeros
        raise CannotAmend(image.file.path, "not consistent: repair it before it becomes one of a newer version")
    pack_header(image.file, _newer(image.header, version))


def _newer(header: Header, version: int) -> Header:
    newer = header.with_version(version)
    return replace(newer, extensions=(*newer.extensions, *feature_names(version, newer.cluster_size)))


async def _require_old_enough(image: Image, size: int, pace: Pace) -> None:
    """Raises: CannotAmend if the image, with a disk of *size* bytes, has what version 2 does not."""
    path, header = image.file.path, image.header
    word = header.record.incompatible_features
    if word & Incompatible.EXTERNAL_DATA:
        raise CannotAmend(path, "Cannot downgrade an image with a data file")
    if rest := word ^ (word & int(Incompatible.COMPRESSION_TYPE | Incompatible.DIRTY)):
        raise CannotAmend(path, f"Cannot downgrade an image with incompatible features {rest:#x} set")
    if any(header.later_fields):
        raise CannotAmend(path, "Cannot downgrade an image with header fields that are not known: they would be lost")
    if header.extension(ExtensionMagic.BITMAPS) is not None:
        raise CannotAmend(path, "Cannot downgrade an image with persistent bitmaps: remove them first")
    await image.require_expandable()
    if any(snapshot.disk_size != size for snapshot in await image.snapshots()):
        raise CannotAmend(path, "Internal snapshots prevent downgrade of image")
    if header.compression_type is not CompressionType.ZLIB:
        report = Report()
        await judge(image.file, report, lambda done, total: pace.require_going())
        if report.compressed_clusters or header.record.nb_snapshots:
            raise CannotAmend(
                path, "Cannot downgrade an image with zstd compression type and existing compressed clusters"
            )


async def prepare(image: Image, wanted: Amendment, pace: Pace) -> None:
    """What comes before another header: the disk's length, zeros said as version 2 can. It is to be closed then.

    Raises: OSError, ImageError, Cancelled; then, too.
    """
    pace.require_going()
    if wanted.size is not None and wanted.size != image.size:
        await image.grow(wanted.size)
    if wanted.version == 2 and image.header.record.version > 2:
        await image.expand_zeros(pace.require_going)


async def amend_header(file: File, wanted: Amendment, pace: Pace) -> None:
    """Let the header of a clean image say what is *wanted*; stable on return.

    Raises: OSError, ImageError; Cancelled, some of it is so then.
    """
    pace.require_going()
    header = await read_header(file)
    version = wanted.version or header.record.version
    if version > header.record.version:
        header = await rewrite_header(file, _newer(header, version))
        if header.record.nb_snapshots:  # version 3 wants more said of each
            await repair(file)
    if wanted.lazy_refcounts is not None and version >= 3:
        header = await set_lazy_refcounts(file, header, is_lazy=wanted.lazy_refcounts)
    pace.tell(2, STEPS)
    if wanted.refcount_order not in (None, header.record.refcount_order):
        assert wanted.refcount_order is not None
        await change_width(file, wanted.refcount_order, lambda done, total: pace.require_going())
    header = await read_header(file)
    if version < header.record.version:
        header = await clear_autoclear(file, header, maintained=Autoclear(0))
        await rewrite_header(file, header.with_version(version))


async def name_data_file(file: File, wanted: DataFileName) -> None:
    """Let the header say of the external data file what is *wanted*; stable on return. Nobody looks at the data.

    Raises: CannotAmend, UnsupportedImage before anything has changed; OSError.
    """
    header = await renamed(file, wanted)
    await rewrite_header(file, await clear_autoclear(file, header, maintained=PROMISES))


async def renamed(file: File, wanted: DataFileName) -> Header:
    """The header of the image in *file* as it is *wanted*. Raises: CannotAmend, UnsupportedImage, OSError."""
    name, is_raw = wanted.name, wanted.is_raw
    header = await read_header(file)
    require_uncorrupted(file, header)
    record = header.record
    if name is not None and not record.has_data_file:
        raise CannotAmend(file.path, "data-file can only be set for images that use an external data file")
    if is_raw and not record.has_raw_data:
        raise CannotAmend(file.path, "data-file-raw cannot be set on existing images")
    if is_raw is False and record.has_raw_data:
        record = replace(record, autoclear_features=record.autoclear_features ^ Autoclear.RAW_EXTERNAL_DATA)
    extensions = header.extensions
    if name is not None:
        extensions = tuple(each for each in extensions if each.magic != ExtensionMagic.DATA_FILE)
    if name:
        extensions = (Extension(ExtensionMagic.DATA_FILE, os.fsencode(name)), *extensions)
    header = replace(header, record=record, extensions=extensions)
    pack_header(file, header)
    return header
