"""What a copy reads: disks, or parts of them, one after the other."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple, TypeVar

from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.operation import Compute, File, ReadInto, Together
from qcow2.engine.backing import Seen
from qcow2.error import ImageError
from qcow2.format.layout import SECTOR_SIZE
from qcow2.node.extent import find_extent
from qcow2.node.node import Node

UNKNOWN = 64 << 10  # bytes that are looked at where nobody can say what is there
SMALL = 128 << 10  # bytes that are looked through before a thread wakes up
OnLoss = Callable[[int, Exception], None]
T = TypeVar("T")


class Piece(NamedTuple):
    """A stretch of the disk as it is in a file."""

    file: File
    host_offset: int

    def reading(self, target: memoryview) -> ReadInto:
        """What fills *target* from it."""
        return ReadInto(self.file, self.host_offset, MemoryBuffer(target), data=True)


async def in_one_piece(image: Node, guest_offset: int, nbytes: int) -> Piece | None:
    """Where the range is, if it is as it is in one piece of a file; nobody writes to it."""
    place = await image.find(guest_offset, nbytes)
    if isinstance(place, Seen) or place[0].is_encrypted:
        return None
    return Piece(place[0].file, place[1])


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
        piece = await self.in_one_piece(offset, len(target))
        looked: T
        if piece is not None:
            looked = await Together([piece.reading(target)], function)
            return looked
        await self.read(offset, target)
        looked = function() if len(target) <= SMALL else await Compute(function)
        return looked

    async def in_one_piece(self, offset: int, nbytes: int) -> Piece | None:
        """Where the range is, if it lies in one piece of a file, and nobody wants to hear of losses."""
        part, inside = self._locate(offset)
        if self._on_loss is not None or inside + nbytes > part.nbytes:
            return None
        return await in_one_piece(part.image, part.start + inside, nbytes)

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
