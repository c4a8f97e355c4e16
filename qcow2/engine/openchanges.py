"""Opening an image for writing: what its file holds of metadata is found, and validated, before anything changes."""

from array import array

from qcow2.driver.operation import File, Read
from qcow2.engine.bitmaptable import StoredBitmap, load_bitmaps
from qcow2.engine.changes import Changes
from qcow2.engine.data import find_untouched
from qcow2.engine.metadata import active_clusters, snapshot_clusters
from qcow2.engine.opened import Found, Opened, OpenOptions
from qcow2.engine.root import Root
from qcow2.error import CorruptImage
from qcow2.format.header import Header, clear_autoclear
from qcow2.format.layout import ENTRY_SIZE, PROMISES, Autoclear, ExtensionMagic, HeaderRecord
from qcow2.format.snapshot import read_snapshots
from qcow2.plane.entry import words_of
from qcow2.plane.linklog import LinkLog


async def open_changes(
    opened: Opened, header: Header, file_size: int, options: OpenOptions, log: LinkLog | None
) -> Changes:
    """What changes the image *opened* from now on: all that its file holds of metadata is known, and nobody's to hit.

    Raises: UnsupportedImage, CorruptImage, OSError.
    """
    file, record, mapping = opened.file, header.record, opened.mapping
    table = words_of(await Read(file, record.refcount_table_offset, record.refcount_table_nbytes))
    _validate_refcount_table(file, record, table, file_size)
    owned = active_clusters(file, opened.geometry, header, mapping.l1, table)
    snapshots = await read_snapshots(file, header)
    owned_by_snapshots = await snapshot_clusters(file, opened.geometry, record, snapshots, file_size)
    mapping.own_metadata(owned + owned_by_snapshots)
    header = await clear_autoclear(file, header, maintained=PROMISES)  # those wait for the first change
    is_lazy = header.has_lazy_refcounts if options.lazy_refcounts is None else options.lazy_refcounts
    root = Root(header, opened.stability, is_lazy=is_lazy)
    bitmaps = await _find_bitmaps(opened, root)
    if record.has_data_file and not record.has_raw_data:
        mapping.cache.set_untouched(await find_untouched(opened.data, opened.geometry))
    found = Found(file_size, table, snapshots, owned_by_snapshots, *bitmaps)
    return Changes(opened, root, found, log if record.version >= 3 else None)  # else there is no place for the tag


async def _find_bitmaps(opened: Opened, root: Root) -> "tuple[list[StoredBitmap], array[int], list[str]]":
    """The bitmaps that are kept from now on, their clusters, and why some cannot be.

    There are none if they cannot be found: the first change voids them.
    """
    if root.header.extension(ExtensionMagic.BITMAPS) is None:
        return [], array("Q"), []
    try:
        bitmaps, owned = await load_bitmaps(opened.file, root.header, opened.geometry, opened.mapping.is_metadata)
    except CorruptImage as error:
        return [], array("Q"), [str(error)]
    opened.mapping.own_metadata(owned)
    root.broken_promises ^= Autoclear.BITMAPS
    lost = [each for each in bitmaps if each.is_kept and each.problem]
    problems = [f"bitmap {each.bitmap.name!r} {each.problem}: the first change makes it void" for each in lost]
    return bitmaps, owned, problems


def _validate_refcount_table(file: File, record: HeaderRecord, table: "array[int]", file_size: int) -> None:
    for index, entry in enumerate(table):
        if entry % (1 << record.cluster_bits) or entry >= file_size:
            where = record.refcount_table_offset + index * ENTRY_SIZE
            raise CorruptImage(file.path, where, f"refcount table entry {index} is invalid: {entry:#x}")
