"""What travels together in the engine: the parts of an open image, and what was in its file."""

from array import array
from dataclasses import dataclass

from qcow2.driver.operation import File
from qcow2.engine.bitmaptable import StoredBitmap
from qcow2.engine.compressed import CompressedClusters
from qcow2.engine.data import Data
from qcow2.engine.mapping import Mapping
from qcow2.engine.reading import Reader
from qcow2.engine.stability import Stability
from qcow2.engine.statistics import Statistics
from qcow2.format.geometry import Geometry
from qcow2.format.snapshot import SnapshotTable


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
    bitmaps: list[StoredBitmap]
    owned_by_bitmaps: "array[int]"
    bitmap_problems: list[str]  # why some cannot be kept
