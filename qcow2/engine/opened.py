"""What travels together: how to open an image, the parts of an open one, and what was in its file."""

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcow2.driver.operation import File
from qcow2.engine.compressed import CompressedClusters
from qcow2.engine.data import Data
from qcow2.engine.mapping import Mapping
from qcow2.engine.reading import Reader
from qcow2.engine.stability import Stability
from qcow2.engine.statistics import Statistics
from qcow2.format.geometry import Geometry
from qcow2.format.snapshot import Choice, SnapshotTable

if TYPE_CHECKING:
    from qcow2.engine.bitmaptable import StoredBitmap
    from qcow2.engine.encryption import Keyring

DEFAULT_CACHE_SIZE = 32 << 20


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """How to open an image."""

    writable: bool = False
    lazy_refcounts: bool | None = None  # None: as the image says
    cache_size: int = DEFAULT_CACHE_SIZE  # bytes of L2 tables in memory, at most
    snapshot: str | Choice | None = None  # read the disk as this one, an id or else a name, holds it
    keys: "Keyring | None" = None  # what may open it, if it is encrypted
    has_data: bool = True  # else an encrypted image opens without a key, and only its mapping can be looked at
    has_below: bool = True  # else its backing file is not opened, and nobody may look at what would show through

    def __post_init__(self) -> None:
        """Raises: ValueError for a size that is none."""
        if self.cache_size < 0:
            raise ValueError(f"cache_size {self.cache_size} is not a number of bytes")


@dataclass(frozen=True, slots=True)
class Opened:
    """The parts of an open image, written to or not."""

    file: File
    data: Data
    geometry: Geometry
    mapping: Mapping
    reader: Reader
    compressed: CompressedClusters
    stability: Stability
    statistics: Statistics


@dataclass(frozen=True, slots=True)
class Found:
    """What the file of an image held when it was opened for writing; owned are the clusters of what is listed."""

    file_size: int
    refcount_table: "array[int]"  # validated
    snapshots: SnapshotTable
    owned_by_snapshots: "array[int]"
    bitmaps: "list[StoredBitmap]"
    owned_by_bitmaps: "array[int]"
    bitmap_problems: list[str]  # why some cannot be kept
