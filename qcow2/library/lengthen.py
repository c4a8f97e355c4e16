"""A longer disk with space for what is new, which takes long where it is written."""

from qcow2.engine.plain import Preallocation
from qcow2.job.pace import Pace
from qcow2.node.node import Node

PIECE = 64 << 20  # bytes: many clusters, and soon done


async def lengthen(image: Node, nbytes: int, preallocation: Preallocation, pace: Pace) -> None:
    """Let the disk be *nbytes* long, what is new as *preallocation* says; nothing else is under way.

    Raises: OSError, ImageError, ValueError; Cancelled between two pieces, the rest is left as without preallocation.
    """
    start = image.size
    await image.grow(nbytes)
    while preallocation is not Preallocation.OFF and start < image.size:
        pace.require_going()
        stop = min(image.size, start - start % PIECE + PIECE)
        await image.preallocate(start, stop - start, writes=preallocation is Preallocation.FULL)
        start = stop
