"""The bitmaps of an image in its census: their directory, their tables, the clusters with their bits."""

from typing import TYPE_CHECKING

from qcow2.error import CorruptImage
from qcow2.format import layout
from qcow2.format.bitmap import Bitmap, bitmap_directory, problem_of, read_bitmaps
from qcow2.format.geometry import Geometry
from qcow2.format.layout import ENTRY_SIZE
from qcow2.plane.tally import Role

if TYPE_CHECKING:
    from qcow2.judge.census import Census


async def count_bitmaps(census: "Census") -> None:
    """Count what the bitmaps refer to, and say which of them nobody can use."""
    try:
        directory = bitmap_directory(census.file, census.header)
        if directory is None:
            return
        if not directory.nb_bitmaps or not directory.directory_size:
            raise CorruptImage(census.file.path, 0, "the header says that there are some, and names none")
        offset, nbytes = directory.directory_offset, directory.directory_size
        if offset + nbytes > census.file_size:
            raise CorruptImage(census.file.path, 0, f"bitmap directory at {offset:#x} leaves the file")
        if not census.add("bitmap directory", offset, nbytes, Role.SINGLE):
            return
        bitmaps = await read_bitmaps(census.file, directory)
    except CorruptImage as problem:
        census.report.error(f"the bitmaps cannot be read: {problem}")
        return
    geometry, names = Geometry.of(census.record), set[bytes]()
    room = layout.MAX_BITMAP_TABLE_BYTES
    for bitmap in bitmaps:
        _judge_bitmap(census, bitmap, geometry, names)
        room -= bitmap.record.table_size * ENTRY_SIZE
        if room < 0:  # as a writer has it
            census.report.error(f"tables of bitmaps take more than {layout.MAX_BITMAP_TABLE_BYTES} bytes together")
            return
        await _count_bitmap(census, bitmap)


def _judge_bitmap(census: "Census", bitmap: Bitmap, geometry: Geometry, names: set[bytes]) -> None:
    """Say if nobody can use it, by its entry; *names* are those of the bitmaps before."""
    if problem := problem_of(bitmap, geometry):
        census.report.void(f"bitmap {bitmap.name!r} {problem}")
        census.report.is_dark = True  # who knows where the rest of the entry leads
    if bitmap.raw_name in names:
        census.report.void(f"bitmap {bitmap.name!r} has the name of another")
    names.add(bitmap.raw_name)


async def _count_bitmap(census: "Census", bitmap: Bitmap) -> None:
    host_offset, nentries = bitmap.record.table_offset, bitmap.record.table_size
    nbytes = nentries * ENTRY_SIZE
    if host_offset + nbytes > census.file_size or (nbytes and census.is_counted(host_offset, nbytes)):
        census.report.error(f"table of bitmap {bitmap.name!r} at {host_offset:#x} cannot lie there")
        return
    if not census.add(f"table of bitmap {bitmap.name!r}", host_offset, nbytes, Role.SINGLE):
        return
    async for _, entry in census.entries(host_offset, nentries):
        offset = entry & layout.BITMAP_ENTRY_OFFSET_MASK
        if entry & layout.BITMAP_ENTRY_RESERVED or (offset and entry & layout.BITMAP_ENTRY_ALL_ONES):
            census.report.corruption(f"entry {entry:#018x} of bitmap {bitmap.name!r} has reserved bits set")
        elif offset:
            census.add(f"data of bitmap {bitmap.name!r}", offset, census.cluster_size, Role.SINGLE)
