"""What an image of the engine asks of whatever is under it, and tells of itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from qcow2.driver.operation import Buffer, File
from qcow2.engine.data import Data
from qcow2.plane.l2cache import ExtentMap, Run

Place = tuple[Data, int]  # of data in one piece: where an image of the chain has its data, the offset there


class Seen(Enum):
    """What a range is that has no place."""

    ZEROS = "the mapping shows that it reads as zeros"
    PIECES = "not in one piece, or compressed"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a node is good at, apart from being a disk."""

    cluster_size: int = 0  # bytes that it maps as one; 0: there is no such thing
    has_snapshots: bool = False
    has_bitmaps: bool = False
    writes_to_grow: bool = False  # all that is new, so that it reads as zeros


class Backing(Protocol):
    """A disk that shows through where the image above it has nothing; it is only read."""

    file: File

    @property
    def data_file(self) -> File:
        """The file that its data lies in, which need not be `file`."""

    @property
    def is_encrypted(self) -> bool:
        """Whether what its file holds is not what the guest reads."""

    @property
    def backing(self) -> "Backing | None":
        """What shows where this one has nothing."""

    @property
    def size(self) -> int:
        """Length of the disk in bytes; past it are zeros."""

    @property
    def extent_map(self) -> ExtentMap | None:
        """The addresses the worker takes; None if only Python can tell."""

    @property
    def chain(self) -> "Sequence[Backing]":
        """This disk and what is under it, top first."""

    def set_slot(self, file: File, slot: int | None) -> None:
        """Say which of the worker's files *file*, one of the chain's, is; None takes it back."""

    async def resolve(self, guest_offset: int, nbytes: int) -> Run:
        """Describe the start of the range: a stretch that this disk, without its backing, has in one way."""

    async def is_hollow(self) -> bool:
        """Whether what it maps as data may be holes of its file."""

    async def read(self, guest_offset: int, target: Buffer) -> None:
        """Fill *target*, which lies inside the disk."""

    async def find(self, guest_offset: int, nbytes: int) -> Place | Seen:
        """Where in the files of the chain the range is, if it is in one piece."""

    async def reads_as_zeros(self, guest_offset: int, nbytes: int) -> bool:
        """Whether it is known without a look at data that the range reads as zeros."""
