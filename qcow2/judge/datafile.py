"""What an image maps past the end of its external data file: it is gone, and reads as zeros."""

from collections.abc import AsyncIterator

from qcow2.driver.operation import File, Read, Size
from qcow2.format.geometry import Geometry
from qcow2.format.header import Header, read_header
from qcow2.format.layout import ENTRY_SIZE, Autoclear
from qcow2.format.pieces import pieces
from qcow2.judge.report import Report
from qcow2.plane.entry import Entries, l1_table, words_of


async def judge_data_file(file: File, data_file: File, report: Report) -> None:
    """Add each cluster whose data began past the end of *data_file* to the *report* of the image in *file*.

    Nothing is lost of those that show zeros; but a raw data file must be as long as the disk. Raises: OSError.
    """
    header = await read_header(file, trust_refcounts=False)
    end, size = await Size(data_file), header.record.size
    if header.record.autoclear_features & Autoclear.RAW_EXTERNAL_DATA and end < size:
        report.corruption(f"the disk ends at {size:#x}, its raw data file at {end:#x}")
    async for host_offset in _mapped_from(file, header, end):
        report.corruption(f"data cluster at {host_offset:#x} lies past the end of the data file at {end:#x}")


async def _mapped_from(file: File, header: Header, end: int) -> AsyncIterator[int]:
    """The clusters with data that begin at *end* or later: where they are in the data file, as on the disk."""
    geometry = Geometry.of(header.record)
    entries = Entries.of(geometry)
    async for table in _tables(file, header, geometry.l1_index(end)):
        for entry in filter(None, entries.unpack(await Read(file, table, geometry.cluster_size))):
            has_data = entries.has_cluster(entry) and not entries.shows_no_data(entry)
            if has_data and end <= entries.host_offset(entry) < geometry.size:
                yield entries.host_offset(entry)


async def _tables(file: File, header: Header, first: int) -> AsyncIterator[int]:
    """Where the L2 tables are, from that index of the L1 table on: inside the file, each once, whatever names it."""
    start, file_end, seen = first * ENTRY_SIZE, await Size(file), {0}
    nbytes = header.record.l1_size * ENTRY_SIZE - start
    async for _, data in pieces(file, header.record.l1_table_offset + start, nbytes, header.cluster_size):
        for table in map(l1_table, words_of(data)):
            if table not in seen and not table % header.cluster_size and table < file_end:
                seen.add(table)
                yield table
