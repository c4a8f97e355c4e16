"""A longer disk with space for what is new, which takes long where it is written."""

from collections.abc import Sequence

from qcow2.driver.file import HostFile, run
from qcow2.engine.plain import Preallocation
from qcow2.job.pace import Pace
from qcow2.library.hostfile import reserve
from qcow2.node.node import Node

PIECE = 64 << 20  # bytes: many clusters, and soon done


def lengthen(image: Node, files: Sequence[HostFile], nbytes: int, preallocation: Preallocation, pace: Pace) -> None:
    """Let the disk be *nbytes* long, what is new as *preallocation* says; *files* are its chain's, the image's first.

    Nothing else is under way.
    Raises: OSError, ImageError, ValueError; Cancelled between two pieces, the rest is left as without preallocation.
    """
    data_file = next((file for file in files if file is image.data_file), files[0])
    end, file_end = image.size, data_file.size()
    run(image.grow(nbytes))
    if preallocation is Preallocation.OFF or end == image.size:
        return
    _preallocate(image, end, pace, writes=preallocation is Preallocation.FULL)
    if preallocation is Preallocation.FALLOC:
        reserve(data_file, file_end if data_file is files[0] else min(end, file_end))


def _preallocate(image: Node, start: int, pace: Pace, *, writes: bool) -> None:
    """Piece by piece."""
    while start < image.size:
        pace.require_going()
        stop = min(image.size, start - start % PIECE + PIECE)
        run(image.preallocate(start, stop - start, writes=writes))
        start = stop
