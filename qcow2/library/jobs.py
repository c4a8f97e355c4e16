"""Long work from Python: each call returns when it is done; *progress(done, total)*, in bytes, sees how far it is.

It is called on the job's thread, which may not be the caller's. What it raises ends the job, and is raised; so does an
interrupt of the caller (KeyboardInterrupt): the image is left as the job's own description says.
"""

import os
from contextlib import ExitStack

from qcow2.driver.pool import PoolDriver
from qcow2.engine.opened import OpenOptions
from qcow2.format.layout import COMPRESSIONS
from qcow2.job import compare as comparison
from qcow2.job.pace import Pace, Progress
from qcow2.library.commit import commit_image
from qcow2.library.convert import Conversion, convert_image
from qcow2.library.key import Key, keys_of
from qcow2.library.make import PathLike, chosen, cluster_bits_of, refuse_others
from qcow2.library.rebase import rebase_image
from qcow2.library.stream import stream_image
from qcow2.node.chain import Chain
from qcow2.node.formats import FORMATS, format_of

NTHREADS = 4


def convert(
    source: PathLike,
    target: PathLike,
    *,
    source_format: str = "qcow2",
    format: str = "qcow2",
    snapshot: str | None = None,
    compress: bool = False,
    compression: str = "zlib",
    level: int | None = None,
    cluster_size: int = 64 << 10,
    key: Key = None,
    progress: Progress | None = None,
    rate: int = 0,
) -> None:
    """Copy the disk of *source*, or what it was at *snapshot*, to a new image *target*, as sparse as it can be.

    *level* is of what *compress* does: 1 to 12 of zlib, 1 to 19 of zstd. *rate* is in bytes a second, 0 as fast as it
    goes. Stable on return; *target* gets its header, or if it is raw its first bytes, last.
    Raises: ValueError, OSError, ImageError; a new file is gone then.
    """
    if format not in ("qcow2", "raw") or source_format not in FORMATS:
        raise ValueError(f"cannot convert from {source_format!r} to {format!r}")
    if format == "raw":
        name, of_qcow2 = os.fsdecode(target), {"compress": compress, "compression": compression, "level": level}
        refuse_others(f"{name}: a raw image", convert, **of_qcow2, cluster_size=cluster_size)
    if level is not None and not compress:
        raise ValueError(f"level {level} without compress")
    wanted = Conversion(
        source_format=source_format,
        target_format=format,
        snapshot=snapshot,
        is_compressed=compress,
        compression=chosen("compression", compression, COMPRESSIONS),
        level=level,
        cluster_bits=cluster_bits_of(cluster_size),
        key=key,
    )
    convert_image(os.fsdecode(source), os.fsdecode(target), Pace(progress, rate), wanted)


def commit(
    path: PathLike,
    base: PathLike | None = None,
    *,
    empty: bool = True,
    key: Key = None,
    progress: Progress | None = None,
    rate: int = 0,
) -> None:
    """Bring what the image at *path* has into its backing file, or into *base* further below; stable on return.

    *empty*: the image has nothing of its own then, if *base* is its backing file. What is between the two is worth
    nothing any more, but through the image.
    Raises: OSError, ImageError, ValueError; what the image shows is as before.
    """
    below = None if base is None else os.fsdecode(base)
    commit_image(os.fsdecode(path), below, Pace(progress, rate), empties=empty, key=key)


def rebase(
    path: PathLike,
    backing: PathLike | None,
    *,
    backing_format: str = "qcow2",
    compress: bool = False,
    key: Key = None,
    progress: Progress | None = None,
) -> None:
    """Put the image at *path* over *backing*, or over nothing; what it shows stays the same. Stable on return.

    *compress*: what is copied into it is compressed. A relative name starts at the directory of the image, and is
    recorded as it is.
    Raises: OSError, ImageError; it is over the old one then.
    """
    format_of(os.fsdecode(path), backing_format)
    name = None if backing is None else os.fsdecode(backing)
    pace = Pace(progress)
    rebase_image(os.fsdecode(path), name, backing_format if name else None, pace, is_compressed=compress, key=key)


def stream(path: PathLike, base: PathLike | None = None, *, key: Key = None, progress: Progress | None = None) -> None:
    """Copy into the image at *path* what shows through it, and put it over *base*, one further below, or nothing.

    Stable on return. What was between is no longer needed by this image.
    Raises: OSError, ImageError; it is over the old chain then.
    """
    stream_image(os.fsdecode(path), None if base is None else os.fsdecode(base), Pace(progress), key=key)


def compare(
    one: PathLike,
    other: PathLike,
    *,
    format: str = "qcow2",
    other_format: str | None = None,
    key: Key = None,
    progress: Progress | None = None,
) -> int | None:
    """Offset of the first sector in which the two disks differ; None if they hold the same.

    What one has more than the other must be zeros.
    Raises: OSError, ImageError.
    """
    with ExitStack() as stack:
        left, right = (
            stack.enter_context(Chain(needs_all=True)).open(
                os.fsdecode(path), image_format, OpenOptions(keys=keys_of(key))
            )
            for path, image_format in ((one, format), (other, other_format or format))
        )
        driver = stack.enter_context(PoolDriver(NTHREADS))
        try:
            found = driver.run(comparison.compare(left, right, Pace(progress)))
        except comparison.ReadFailed as failure:
            raise failure.__cause__ or failure from None
    return None if found is None else found.guest_offset
