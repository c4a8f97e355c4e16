"""How large a new image will be: all of its tables, and the clusters that the source has data in."""

from dataclasses import dataclass

from qcow2.engine.create import Options
from qcow2.engine.image import Image
from qcow2.engine.plain import Preallocation
from qcow2.format.bitmap import bitmap_directory, read_bitmaps
from qcow2.format.clusters import clusters_of, counting_clusters, full_clusters
from qcow2.format.layout import ENTRY_SIZE, BitmapRecord
from qcow2.node.extent import find_extent
from qcow2.node.node import Node


@dataclass(frozen=True, slots=True)
class Measures:
    """Bytes of the image's file."""

    required: int  # at first
    fully_allocated: int  # once the guest has written everything
    bitmaps: int | None  # of the source, if they were taken along; None if they cannot be, as to a snapshot's length


def size_of_raw(size: int) -> Measures:
    """A raw file is as long as its disk."""
    return Measures(size, size, None)


def size_of_empty(options: Options) -> Measures:
    """An image without data; *options* hold the size of its disk."""
    full = _fully_allocated(options)
    return Measures(full if _is_reserved(options) else full - _data_bytes(options), full, None)


async def size_of_copy(options: Options, source: Node) -> Measures:
    """An image that *source* is copied to; what it shares with a backing file cannot be told.

    Raises: OSError, ImageError.
    """
    full = _fully_allocated(options)
    required = full
    if not _is_reserved(options) and options.backing_name is None:
        required = full - _data_bytes(options) + await _bytes_with_data(options, source)
    bitmaps = None
    if isinstance(source, Image) and source.geometry.can_have_bitmaps and options.version >= 3:
        bitmaps = await _bitmap_bytes(options, source)
    return Measures(required, full, bitmaps)


def _is_reserved(options: Options) -> bool:
    return options.preallocation in (Preallocation.FALLOC, Preallocation.FULL)


def _data_bytes(options: Options) -> int:
    return _clusters(options.size, options) * options.cluster_size


def _fully_allocated(options: Options) -> int:
    counted = full_clusters(options.size, options.cluster_size, options.entries.nbytes, options.luks_clusters)
    return (
        counted + sum(counting_clusters(counted, options.cluster_size, options.refcount_order))
    ) * options.cluster_size


def _clusters(nbytes: int, options: Options) -> int:
    return clusters_of(nbytes, options.cluster_size)


async def _bytes_with_data(options: Options, source: Node) -> int:
    """Of the clusters that hold some."""
    counted = offset = 0
    while offset < source.size:
        extent = await find_extent(source, offset, source.size - offset)
        end = offset + extent.nbytes
        if not extent.is_zero:
            start, end = offset // options.cluster_size, _clusters(end, options)
            counted += (end - start) * options.cluster_size
            end *= options.cluster_size
        offset = end
    return counted


async def _bitmap_bytes(options: Options, source: Image) -> int | None:
    """Clusters of the directory, and of all bitmaps with all their bits; None: they are of a disk of another size."""
    directory = bitmap_directory(source.file, source.header)
    if directory is None or not directory.nb_bitmaps:
        return 0
    if await source.bitmapped_size() != source.size:
        return None
    clusters = entries = 0
    for bitmap in await read_bitmaps(source.file, directory):
        bits = -(-source.size >> bitmap.record.granularity_bits)
        data = _clusters(-(-bits // 8), options)
        clusters += data + _clusters(data * ENTRY_SIZE, options)
        nbytes = BitmapRecord.FORMAT.size + bitmap.record.name_size
        entries += nbytes + -nbytes % 8
    return (clusters + _clusters(entries, options)) * options.cluster_size
