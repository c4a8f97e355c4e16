"""How many host clusters an image takes: what refcounts need, and all of it once every byte of the disk is data."""

from typing import NamedTuple

from qcow2.format.layout import ENTRY_SIZE


class CountingClusters(NamedTuple):
    """Of the refcount table and its blocks."""

    table: int
    blocks: int


def clusters_of(nbytes: int, cluster_size: int) -> int:
    """How many clusters of *cluster_size* bytes hold *nbytes*."""
    return -(-nbytes // cluster_size)


def counting_clusters(counted: int, cluster_size: int, refcount_order: int) -> CountingClusters:
    """What counts *counted* clusters and itself."""
    per_block = cluster_size * 8 >> refcount_order
    table = blocks = 0
    while blocks * per_block < counted + table + blocks or not table:
        blocks = clusters_of(counted + table + blocks, per_block)
        table = clusters_of(blocks * ENTRY_SIZE, cluster_size)
    return CountingClusters(table, blocks)


def full_clusters(size: int, cluster_size: int, entry_size: int, more: int = 0) -> int:
    """Of a disk of *size* bytes that are all data: header, tables, data and *more*; refcounts are not among them."""
    data = clusters_of(size, cluster_size)
    l2 = clusters_of(data * entry_size, cluster_size)
    return 1 + clusters_of(l2 * ENTRY_SIZE, cluster_size) + l2 + data + more
