"""What a copy reads: disks, or parts of them, one after the other."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from qcow2.driver.buffer import MemoryBuffer
from qcow2.error import ImageError
from qcow2.format.layout import SECTOR_SIZE
from qcow2.node.extent import find_extent
from qcow2.node.node import Node

UNKNOWN = 64 << 10  # bytes that are looked at where nobody can say what is there
OnLoss = Callable[[int, Exception], None]


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

    def __init__(self, parts: list[Part], *, tells_below: bool = False, on_loss: OnLoss | None = None) -> None:
        """*tells_below* sets apart what comes from a backing file, for a copy that shares it.

        *on_loss*: what cannot be read is zeros, and that is told, with where it is on the disk.
        """
        self._on_loss = on_loss
        self._parts = parts
        self._tells_below = tells_below
        self.size = sum(part.nbytes for part in parts)

    @classmethod
    def of(cls, *images: Node, tells_below: bool = False, on_loss: OnLoss | None = None) -> "Source":
        """Whole disks."""
        return cls([Part(image, 0, image.size) for image in images], tells_below=tells_below, on_loss=on_loss)

    def _locate(self, offset: int) -> tuple[Part, int]:
        for part in self._parts:
            if offset < part.nbytes:
                return part, offset
            offset -= part.nbytes
        raise ValueError(f"{offset} bytes past the end of the source")

    async def find(self, offset: int) -> tuple[Content, int]:
        """What is at *offset*, and how many bytes of it."""
        part, inside = self._locate(offset)
        try:
            extent = await find_extent(part.image, part.start + inside, part.nbytes - inside)
        except (OSError, ImageError):
            if self._on_loss is None:
                raise
            return Content.DATA, min(part.nbytes - inside, UNKNOWN)
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
            await self._read_part(part, inside, front, offset)
            offset += len(front)
            target = target[len(front) :]

    async def _read_part(self, part: Part, inside: int, target: memoryview, offset: int) -> None:
        """Read from *inside* of *part* on; with `on_loss` as much of it as can be read, by halves."""
        try:
            await part.image.read(part.start + inside, MemoryBuffer(target))
        except (OSError, ImageError) as error:
            if self._on_loss is None:
                raise
            if len(target) <= SECTOR_SIZE:
                target[:] = bytes(len(target))
                self._on_loss(offset, error)
                return
            half = max(SECTOR_SIZE, len(target) // 2 // SECTOR_SIZE * SECTOR_SIZE)
            await self._read_part(part, inside, target[:half], offset)
            await self._read_part(part, inside + half, target[half:], offset + half)
