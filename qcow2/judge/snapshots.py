"""Snapshot table entries that lack what version 3 asks for, completed as the specification reads them."""

from qcow2.driver.operation import Write
from qcow2.format import layout
from qcow2.format.header import make_stable
from qcow2.format.layout import Incompatible
from qcow2.format.snapshot import SnapshotTable, pack_snapshots
from qcow2.judge.census import Census


async def complete_snapshots(census: Census) -> None:
    """Let each snapshot say how long its VM state and its disk are; stable on return.

    The new table goes to free clusters and is stable before the header points at it. Nobody has counted it yet, nor
    the old one down: the dirty bit says so until the repair has ended, or the next one.
    Raises: UnsupportedImage beyond the limits.
    """
    file, record = census.file, census.record
    table_bytes = (1 << 2 * record.cluster_bits) // record.entry_size
    completed = [each if each.is_complete else each.completed(table_bytes) for each in census.snapshots]
    table = SnapshotTable.of(completed, file.path)
    host_offset = census.tally.find_free(-(-table.nbytes >> record.cluster_bits)) << record.cluster_bits
    dirty = record.incompatible_features | int(Incompatible.DIRTY)
    await Write(file, host_offset, pack_snapshots(table.snapshots))
    await Write(file, layout.HEADER_INCOMPATIBLE_OFFSET, layout.FEATURE_WORD.pack(dirty))
    await make_stable(file)
    await Write(file, layout.HEADER_SNAPSHOTS_OFFSET, layout.HEADER_SNAPSHOTS.pack(len(completed), host_offset))
    await make_stable(file)
