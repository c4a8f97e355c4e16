"""What a copy reads: disks, or parts of them, one after the other."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeVar

from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.operation import Compute, ReadInto, Together
from qcow2.engine.backing import Seen
from qcow2.error import ImageError
from qcow2.format.layout import SECTOR_SIZE
from qcow2.node.extent import find_extent
from qcow2.node.node import Node

UNKNOWN = 64 << 10  # bytes that are looked at where nobody can say what is there
SMALL = 128 << 10  # bytes that are looked through before a thread wakes up
OnLoss = Callable[[int, Exception], None]
T = TypeVar("T")


async def whole(image: Node, guest_offset: int, target: memoryview) -> ReadInto | None:
    """What fills *target* from the disk at once, if that is as it is in one piece of a file; nobody writes to it."""
    place = await image.find(guest_offset, len(target))
    if isinstance(place, Seen) or place[0].is_encrypted:
        return None
    return ReadInto(place[0].file, place[1], MemoryBuffer(target), data=True)


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

    async def look(self, offset: int, target: memoryview, function: Callable[[], T]) -> T:
        """Fill *target* from *offset* on, then the result of *function*, which looks at it. Raises: as `read`."""
        reading = None if self._on_loss is not None else await self.whole(offset, target)
        looked: T
        if reading is not None:
            looked = await Together([reading], function)
            return looked
        await self.read(offset, target)
        looked = function() if len(target) <= SMALL else await Compute(function)
        return looked

    async def whole(self, offset: int, target: memoryview) -> ReadInto | None:
        """What fills *target* at once, where all of it lies in one piece."""
        part, inside = self._locate(offset)
        return await whole(part.image, part.start + inside, target) if inside + len(target) <= part.nbytes else None

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
