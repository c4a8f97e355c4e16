"""What a copy reads: disks, or parts of them, one after the other."""

from dataclasses import dataclass
from enum import Enum, auto

from qcow2.driver.buffer import MemoryBuffer
from qcow2.node.extent import find_extent
from qcow2.node.node import Node


class Content(Enum):
    """What a stretch of the source is to a copy."""

    DATA = auto()  # has to be looked at
    ZEROS = auto()
    BELOW = auto()  # comes from under the top image


@dataclass(frozen=True, slots=True)
class Part:
    """*nbytes* of *image*, from *start* on."""

    image: Node
    start: int
    nbytes: int


class Source:
    """The parts as one disk."""

    def __init__(self, parts: list[Part], *, tells_below: bool = False) -> None:
        """*tells_below* sets apart what comes from a backing file, for a copy that shares it."""
        self._parts = parts
        self._tells_below = tells_below
        self.size = sum(part.nbytes for part in parts)

    @classmethod
    def of(cls, *images: Node, tells_below: bool = False) -> "Source":
        """Whole disks."""
        return cls([Part(image, 0, image.size) for image in images], tells_below=tells_below)

    def _locate(self, offset: int) -> tuple[Part, int]:
        for part in self._parts:
            if offset < part.nbytes:
                return part, offset
            offset -= part.nbytes
        raise ValueError(f"{offset} bytes past the end of the source")

    async def find(self, offset: int) -> tuple[Content, int]:
        """What is at *offset*, and how many bytes of it."""
        part, inside = self._locate(offset)
        extent = await find_extent(part.image, part.start + inside, part.nbytes - inside)
        if self._tells_below and (extent.depth > 0 or not extent.is_present):
            return Content.BELOW, extent.nbytes
        return Content.ZEROS if extent.is_zero else Content.DATA, extent.nbytes

    async def read(self, offset: int, target: memoryview) -> None:
        """Fill *target* from *offset* on.

        Raises: OSError, ImageError.
        """
        while target:
            part, inside = self._locate(offset)
            front = target[: part.nbytes - inside]
            await part.image.read(part.start + inside, MemoryBuffer(front))
            offset += len(front)
            target = target[len(front) :]
