"""A longer disk with space for what is new, which takes long where it is written."""

from collections.abc import Sequence
from contextlib import suppress

from qcow2.driver.file import HostFile, run
from qcow2.engine.image import Image
from qcow2.engine.plain import Preallocation
from qcow2.error import ImageError
from qcow2.job.pace import Cancelled, Pace
from qcow2.library.hostfile import reserve
from qcow2.node.node import Node, growth

PIECE = 64 << 20  # bytes: many clusters, and soon done


def lengthen(image: Node, files: Sequence[HostFile], nbytes: int, preallocation: Preallocation, pace: Pace) -> None:
    """Let the disk be *nbytes* long, what is new as *preallocation* says; *files* are its chain's, the image's first.

    Nothing else is under way. The size is stable before the space is there: a death leaves the longer disk with less
    of it, as does a host that fails again while the disk gets its old size back.
    Raises: OSError, ImageError, ValueError; the size is as before then, as is the length of a file of mere data.
    Where all that is new is written an image that proves corrupt on the way is as long as it got: nobody changes it.
    Cancelled between two pieces: as before if the disk is written as it gets longer, else the rest is left as without
    preallocation.
    """
    data_file = next((file for file in files if file is image.data_file), files[0])
    end, file_end = image.size, data_file.size()
    _grow(image, nbytes, pace)
    if preallocation is Preallocation.OFF or end == image.size:
        return
    try:
        _preallocate(image, end, pace, writes=preallocation is Preallocation.FULL)
        if preallocation is Preallocation.FALLOC:
            _reserve(data_file, file_end if data_file is files[0] else min(end, file_end))
    except (OSError, ImageError):
        _shorten(image, end)
        holds_tables = isinstance(image, Image) and data_file is files[0]
        if image.size == end and not holds_tables and not data_file.is_device:
            with suppress(OSError):
                data_file.set_length(file_end)  # which need not be the disk's
        raise


def _grow(image: Node, nbytes: int, pace: Pace) -> None:
    """At once; piece by piece where all that is new is written: none of it stays after an error."""
    end = image.size
    run(image.grown_size(nbytes))
    try:
        for stop in growth(image, nbytes):
            pace.require_going()
            run(image.grow(stop))
    except (OSError, Cancelled):
        if image.size > end:
            with suppress(OSError):
                run(image.shrink(end))
        raise


def _preallocate(image: Node, start: int, pace: Pace, *, writes: bool) -> None:
    """Piece by piece."""
    while start < image.size:
        pace.require_going()
        stop = min(image.size, start - start % PIECE + PIECE)
        run(image.preallocate(start, stop - start, writes=writes))
        start = stop


def _reserve(file: HostFile, start: int) -> None:
    """Raises: OSError that names the file."""
    try:
        reserve(file, start)
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.path) from error


def _shorten(image: Node, nbytes: int) -> None:
    """Let the disk be *nbytes* long again if that can be; on a full host bitmaps of that size take space, too."""
    with suppress(OSError, ImageError):
        run(image.discard(nbytes, image.size - nbytes))
    with suppress(OSError, ImageError):
        run(image.shrink(nbytes))
