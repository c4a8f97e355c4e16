"""Where the tables of an image lie: the host clusters that neither guest data nor an allocation may touch.

Bitmaps are not among them: the first change voids them (`qcow2.engine.root`), before it can overwrite one.
"""

from array import array

from qcow2.driver.operation import File
from qcow2.engine.mapping import sort_clusters
from qcow2.error import CorruptImage, UnsupportedImage
from qcow2.format.geometry import Geometry
from qcow2.format.header import Header
from qcow2.format.layout import ENTRY_SIZE, MAX_L1_BYTES, HeaderRecord
from qcow2.format.pieces import pieces
from qcow2.format.snapshot import SnapshotTable
from qcow2.native import ffi, lib
from qcow2.plane.entry import l1_table, words_of

MAX_SNAPSHOT_CLUSTERS = 1 << 20  # clusters with tables of snapshots that are kept in memory, 8 bytes each
PIECE = 1 << 20  # bytes of L1 tables that are read at a time


def table_clusters(geometry: Geometry, header: Header, l1: "array[int]", refcount_table: "array[int]") -> "array[int]":
    """The host clusters of the header and the active image's tables, one that two share twice."""
    bits, record = geometry.cluster_bits, header.record
    clusters = array("Q", [0])
    luks_offset, luks_bytes = header.luks_area
    clusters.extend(range(luks_offset >> bits, geometry.clusters(luks_offset + luks_bytes)))
    start = record.l1_table_offset
    clusters.extend(range(start >> bits, geometry.clusters(start + ENTRY_SIZE * len(l1))))
    start = record.refcount_table_offset >> bits
    clusters.extend(range(start, start + record.refcount_table_clusters))
    clusters += _led_to(refcount_table, bits)
    clusters += _led_to(l1, bits)
    return clusters


def active_clusters(
    file: File, geometry: Geometry, header: Header, l1: "array[int]", refcount_table: "array[int]"
) -> "array[int]":
    """The same, sorted. Raises: CorruptImage if two tables overlap."""
    bits, clusters = geometry.cluster_bits, table_clusters(geometry, header, l1, refcount_table)
    sort_clusters(clusters)
    index = lib.clusters_repeated(ffi.from_buffer("uint64_t[]", clusters), len(clusters))
    if index < len(clusters):
        where = clusters[index] << bits
        raise CorruptImage(file.path, where, f"two tables share the cluster at {where:#x}")
    return clusters


def _led_to(entries: "array[int]", cluster_bits: int) -> "array[int]":
    """The clusters that the *entries* of a table lead to."""
    clusters = array("Q", bytes(len(entries) * ENTRY_SIZE))
    found, into = ffi.from_buffer("uint64_t[]", entries), ffi.from_buffer("uint64_t[]", clusters)
    n = lib.clusters_of(found, len(entries), cluster_bits, into)
    ffi.release(into)
    del clusters[n:]
    return clusters


async def snapshot_clusters(
    file: File, geometry: Geometry, record: HeaderRecord, table: SnapshotTable, file_size: int
) -> "array[int]":
    """The sorted numbers of the host clusters that hold the snapshot table and the tables of the snapshots, each once.

    A table that cannot lie where it is said to be is nowhere.
    Raises: UnsupportedImage beyond the limit.
    """
    clusters: set[int] = set()

    def add(host_offset: int, nbytes: int) -> None:
        span = range(host_offset >> geometry.cluster_bits, geometry.clusters(host_offset + nbytes))
        if host_offset + nbytes <= file_size and len(span) <= MAX_SNAPSHOT_CLUSTERS:
            clusters.update(span)
        if max(len(span), len(clusters)) > MAX_SNAPSHOT_CLUSTERS:
            message = f"tables of snapshots take more than their limit of {MAX_SNAPSHOT_CLUSTERS} clusters"
            raise UnsupportedImage(file.path, message)

    add(record.snapshots_offset, table.nbytes)
    for start, stop in _l1_stretches(geometry, table, file_size):
        add(start, stop - start)
        async for _, piece in pieces(file, start, stop - start, PIECE):
            for entry in set(words_of(piece)):
                if l1_table(entry):
                    add(l1_table(entry), geometry.cluster_size)
    return array("Q", sorted(clusters))


def _l1_stretches(geometry: Geometry, table: SnapshotTable, file_size: int) -> list[list[int]]:
    """Start and end of what the snapshots' L1 tables take, each byte once: those that overlap could take forever."""
    stretches: list[list[int]] = []
    for start, nbytes in sorted(_l1_tables(table)):
        stop = start + nbytes
        if start % geometry.cluster_size or stop > file_size:
            continue
        if stretches and start < stretches[-1][1]:
            stretches[-1][1] = max(stretches[-1][1], stop)
        else:
            stretches.append([start, stop])
    return stretches


def _l1_tables(table: SnapshotTable) -> set[tuple[int, int]]:
    """Host offset and length of the snapshots' L1 tables, as far as those are possible."""
    places = {(each.record.l1_table_offset, each.record.l1_size * ENTRY_SIZE) for each in table.snapshots}
    return {(offset, nbytes) for offset, nbytes in places if 0 < nbytes <= MAX_L1_BYTES}


def table_limit(l1: "array[int]", table: SnapshotTable) -> int:
    """How many L2 tables the image and its snapshots have, at most."""
    return len(l1) - l1.count(0) + sum(nbytes // ENTRY_SIZE for _, nbytes in _l1_tables(table))
