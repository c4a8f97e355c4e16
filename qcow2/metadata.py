"""Where the tables of an image lie: the host clusters that neither guest data nor an allocation may touch.

Bitmaps are not among them: the first change voids them (`qcow2.root`), before it can overwrite one.
"""

from array import array
from itertools import pairwise

from qcow2.error import CorruptImage, UnsupportedImage
from qcow2.geometry import Geometry
from qcow2.layout import ENTRY_SIZE, MAX_L1_BYTES, OFFSET_MASK, HeaderRecord
from qcow2.mapping import entries_of
from qcow2.operation import File, Read
from qcow2.snapshot import SnapshotTable

MAX_SNAPSHOT_CLUSTERS = 1 << 20  # clusters with tables of snapshots that are kept in memory, 8 bytes each


def active_clusters(
    file: File, geometry: Geometry, record: HeaderRecord, l1: "array[int]", refcount_table: "array[int]"
) -> "array[int]":
    """The sorted numbers of the host clusters that hold the active image's tables.

    Raises: CorruptImage if two tables overlap.
    """
    bits = geometry.cluster_bits
    clusters = [0]
    clusters += range(record.l1_table_offset >> bits, geometry.clusters(record.l1_table_offset + 8 * len(l1)))
    start = record.refcount_table_offset >> bits
    clusters += range(start, start + record.refcount_table_clusters)
    clusters += [entry >> bits for entry in refcount_table if entry]
    clusters += [(entry & OFFSET_MASK) >> bits for entry in l1 if entry & OFFSET_MASK]
    clusters.sort()
    for one, other in pairwise(clusters):
        if one == other:
            raise CorruptImage(file.path, one << bits, f"two tables share the cluster at {one << bits:#x}")
    return array("Q", clusters)


async def snapshot_clusters(
    file: File, geometry: Geometry, record: HeaderRecord, table: SnapshotTable, file_size: int
) -> "array[int]":
    """The sorted numbers of the host clusters that hold the snapshot table and the tables of the snapshots, each once.

    A table that cannot lie where it is said to be is nowhere.
    Raises: UnsupportedImage beyond the limit.
    """
    clusters: set[int] = set()

    def add(host_offset: int, nbytes: int) -> None:
        if host_offset + nbytes <= file_size:
            clusters.update(range(host_offset >> geometry.cluster_bits, geometry.clusters(host_offset + nbytes)))
        if len(clusters) > MAX_SNAPSHOT_CLUSTERS:
            message = f"tables of snapshots take more than their limit of {MAX_SNAPSHOT_CLUSTERS} clusters"
            raise UnsupportedImage(file.path, message)

    add(record.snapshots_offset, table.nbytes)
    for host_offset, nbytes in _l1_tables(table):
        add(host_offset, nbytes)
        if host_offset + nbytes <= file_size:
            for entry in set(entries_of(await Read(file, host_offset, nbytes))):
                if entry & OFFSET_MASK:
                    add(entry & OFFSET_MASK, geometry.cluster_size)
    return array("Q", sorted(clusters))


def _l1_tables(table: SnapshotTable) -> set[tuple[int, int]]:
    """Host offset and length of the snapshots' L1 tables, as far as those are possible."""
    places = {(each.record.l1_table_offset, each.record.l1_size * ENTRY_SIZE) for each in table.snapshots}
    return {(offset, nbytes) for offset, nbytes in places if 0 < nbytes <= MAX_L1_BYTES}


def table_limit(l1: "array[int]", table: SnapshotTable) -> int:
    """How many L2 tables the image and its snapshots have, at most."""
    return sum(map(bool, l1)) + sum(nbytes // ENTRY_SIZE for _, nbytes in _l1_tables(table))
