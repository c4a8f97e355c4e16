"""The snapshot table: the internal snapshots of an image, read with every length checked."""

import os
from dataclasses import dataclass

from qcow2 import layout
from qcow2.error import CorruptImage, UnsupportedImage
from qcow2.header import Header
from qcow2.layout import SNAPSHOT_EXTRA, SnapshotRecord
from qcow2.operation import File, Read, Size


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One internal snapshot."""

    record: SnapshotRecord
    id: str
    name: str
    vm_state_size: int
    disk_size: int  # bytes; the image's own size where the snapshot does not say
    icount: int | None


@dataclass(frozen=True, slots=True)
class SnapshotTable:
    """All of them, and how many bytes their table takes."""

    snapshots: tuple[Snapshot, ...]
    nbytes: int


async def read_snapshots(file: File, header: Header) -> SnapshotTable:
    """Read the snapshot table that a validated *header* points at.

    Raises: CorruptImage if it leaves the file; UnsupportedImage beyond the limits.
    """
    start = end = header.record.snapshots_offset
    file_size = await Size(file)
    found = []
    for index in range(header.record.nb_snapshots):
        snapshot, end = await _read_snapshot(file, header, end + -end % 8, index)
        if end > file_size:
            raise CorruptImage(file.path, start, f"snapshot {index} ends past the end of the file at {file_size:#x}")
        if end - start > layout.MAX_SNAPSHOT_TABLE_BYTES:
            limit = layout.MAX_SNAPSHOT_TABLE_BYTES
            raise UnsupportedImage(file.path, f"snapshot table takes more than its limit of {limit} bytes")
        found.append(snapshot)
    return SnapshotTable(tuple(found), end - start)


async def _read_snapshot(file: File, header: Header, offset: int, index: int) -> tuple[Snapshot, int]:
    """One snapshot, and where it ends; QEMU does not pad the last one."""
    record = SnapshotRecord.parse(await Read(file, offset, SnapshotRecord.FORMAT.size))
    limit = layout.MAX_SNAPSHOT_EXTRA_BYTES
    if record.extra_data_size > limit:
        message = f"snapshot {index} has {record.extra_data_size} bytes of extra data, limit {limit}"
        raise UnsupportedImage(file.path, message)
    nbytes = record.extra_data_size + record.id_size + record.name_size
    rest = await Read(file, offset + SnapshotRecord.FORMAT.size, nbytes)
    extra, strings = rest[: record.extra_data_size], rest[record.extra_data_size :]
    state_size, disk_size, icount = SNAPSHOT_EXTRA.unpack_from(extra + bytes(SNAPSHOT_EXTRA.size))
    snapshot = Snapshot(
        record,
        os.fsdecode(strings[: record.id_size]),
        os.fsdecode(strings[record.id_size :]),
        state_size if len(extra) >= 8 else record.vm_state_size,
        disk_size if len(extra) >= 16 else header.record.size,
        icount if len(extra) >= 24 else None,
    )
    return snapshot, offset + SnapshotRecord.FORMAT.size + nbytes
