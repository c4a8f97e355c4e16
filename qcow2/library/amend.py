"""Change what an image is: its version, its refcounts, what it asks of who writes to it.

Each step leaves a whole image that shows the same disk: contents first, while the old header says how to read them,
then one sector of the header.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from qcow2.driver.file import HostFile, run
from qcow2.driver.memory import DEFAULT_DIRECTORY
from qcow2.engine.create import feature_names
from qcow2.engine.image import Image
from qcow2.error import ImageError
from qcow2.format.header import Header, clear_autoclear, read_header, rewrite_header, set_lazy_refcounts
from qcow2.format.layout import (
    V2_REFCOUNT_ORDER,
    Autoclear,
    CompressionType,
    ExtensionMagic,
    Incompatible,
)
from qcow2.judge.check import judge
from qcow2.judge.repair import change_width, repair
from qcow2.judge.report import Report
from qcow2.library.disk import Disk, Key, open_disk


@dataclass(frozen=True, slots=True)
class Amendment:
    """What an image shall be; None: as it is."""

    size: int | None = None  # not less than now
    version: int | None = None
    lazy_refcounts: bool | None = None
    refcount_order: int | None = None


class CannotAmend(ImageError):
    """The image cannot be what it shall be; nothing has changed."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.reason = reason


def amend_image(
    path: str,
    wanted: Amendment,
    *,
    tell: Callable[[int, int], None] = lambda done, total: None,
    log_directory: str = DEFAULT_DIRECTORY,
    discard_log: bool = False,
    key: Key = None,
) -> None:
    """Let the image at *path* be what is *wanted*; stable on return. Its disk is as before, but for the size.

    *tell(done, total)* sees how many steps are done.
    Raises: OSError, ImageError, ValueError; what was not refused at once may be done in part, each part whole.
    """
    with open_disk(path, writable=True, log_directory=log_directory, discard_log=discard_log, key=key) as disk:
        image = disk.image
        assert isinstance(image, Image)
        _validate(disk, image.header, wanted)
        tell(0, 3)
        if wanted.size is not None and wanted.size != image.size:
            disk.resize(wanted.size)
        if wanted.version == 2 and image.header.record.version > 2:
            run(image.expand_zeros())
        disk.clean()
        tell(1, 3)
        file = disk.files[0]
        _amend_header(file, run(read_header(file)), wanted, lambda: tell(2, 3))
        tell(3, 3)
        disk.abandon()  # it is clean, and its header is not the one it was opened with


def _validate(disk: Disk, header: Header, wanted: Amendment) -> None:
    path, record = disk.files[0].path, header.record
    version = wanted.version or record.version
    order = record.refcount_order if wanted.refcount_order is None else wanted.refcount_order
    if wanted.size is not None and wanted.size < disk.size:
        raise CannotAmend(path, "a smaller size would lose what is past it; see resize --shrink")
    if version < 3 and wanted.lazy_refcounts:
        text = "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)"
        raise CannotAmend(path, text)
    if version < 3 and order != V2_REFCOUNT_ORDER:
        if record.version < 3 or wanted.refcount_order is not None:
            text = "Refcount widths other than 16 bits require compatibility level 1.1 or above"
            raise CannotAmend(path, f"{text} (use compat=1.1 or greater)")
        raise CannotAmend(path, "compat=0.10 requires refcount_bits=16")
    if version < record.version:
        _require_old_enough(disk, header)


def _require_old_enough(disk: Disk, header: Header) -> None:
    """Raises: CannotAmend if the image has what version 2 does not."""
    path, word = disk.files[0].path, header.record.incompatible_features
    if word & Incompatible.EXTERNAL_DATA:
        raise CannotAmend(path, "Cannot downgrade an image with a data file")
    if rest := word ^ (word & int(Incompatible.COMPRESSION_TYPE | Incompatible.DIRTY)):
        raise CannotAmend(path, f"Cannot downgrade an image with incompatible features {rest:#x} set")
    if header.extension(ExtensionMagic.BITMAPS) is not None:
        raise CannotAmend(path, "Cannot downgrade an image with persistent bitmaps: remove them first")
    if any(snapshot.disk_size != disk.size for snapshot in disk.snapshots()):
        raise CannotAmend(path, "Internal snapshots prevent downgrade of image")
    if header.compression_type is not CompressionType.ZLIB:
        report = Report()
        run(judge(disk.files[0], report))
        if report.compressed_clusters or header.record.nb_snapshots:
            raise CannotAmend(
                path, "Cannot downgrade an image with zstd compression type and existing compressed clusters"
            )


def _amend_header(file: HostFile, header: Header, wanted: Amendment, tell: Callable[[], None]) -> None:
    version = wanted.version or header.record.version
    if version > header.record.version:
        newer = header.with_version(version)
        header = run(
            rewrite_header(
                file, replace(newer, extensions=(*newer.extensions, *feature_names(version, newer.cluster_size)))
            )
        )
        if header.record.nb_snapshots:  # version 3 wants more said of each
            run(repair(file))
    if wanted.lazy_refcounts is not None and version >= 3:
        header = run(set_lazy_refcounts(file, header, is_lazy=wanted.lazy_refcounts))
    tell()
    if wanted.refcount_order not in (None, header.record.refcount_order):
        assert wanted.refcount_order is not None
        run(change_width(file, wanted.refcount_order))
    header = run(read_header(file))
    if version < header.record.version:
        header = run(clear_autoclear(file, header, maintained=Autoclear(0)))
        run(rewrite_header(file, header.with_version(version)))
