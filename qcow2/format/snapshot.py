"""The snapshot table: the internal snapshots of an image, read with every length checked, and packed again."""

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

from qcow2.driver.operation import File, Read, Size
from qcow2.error import CorruptImage, UnsupportedImage
from qcow2.format import layout, refusal
from qcow2.format.header import Header
from qcow2.format.layout import SECTOR_SIZE, SNAPSHOT_EXTRA, HeaderRecord, SnapshotRecord

MAX_NAME_BYTES = 255  # as QEMU has it
SIZES_BYTES = 16  # of extra data: the length of the VM state, and that of the disk


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One internal snapshot."""

    record: SnapshotRecord
    id: str
    name: str
    vm_state_size: int
    disk_size: int  # bytes, whole sectors; the image's own size where the snapshot does not say
    icount: int | None
    extra: bytes  # as it stands in the file, with what we do not know

    @property
    def is_complete(self) -> bool:
        """Whether it says all that version 3 asks for."""
        return len(self.extra) >= SIZES_BYTES

    def completed(self, table_bytes: int) -> "Snapshot":
        """The same, complete: a disk as long as the image's, but no longer than its own L1 table reaches.

        An L2 table maps *table_bytes* of it.
        """
        disk_size = min(self.disk_size, self.record.l1_size * table_bytes)
        extra = SNAPSHOT_EXTRA.pack(self.vm_state_size, disk_size, 0)[:SIZES_BYTES]
        return replace(self, record=replace(self.record, extra_data_size=SIZES_BYTES), disk_size=disk_size, extra=extra)


@dataclass(frozen=True, slots=True)
class SnapshotTable:
    """All of them, and how many bytes their table takes."""

    snapshots: tuple[Snapshot, ...]
    nbytes: int

    @classmethod
    def of(cls, snapshots: Iterable[Snapshot], path: str) -> Self:
        """The table of *snapshots* for the image at *path*. Raises: UnsupportedImage beyond the limits."""
        found = tuple(snapshots)
        nbytes = len(pack_snapshots(found))
        if len(found) > layout.MAX_SNAPSHOTS:
            raise UnsupportedImage(path, f"{len(found)} snapshots, limit {layout.MAX_SNAPSHOTS}")
        if nbytes > layout.MAX_SNAPSHOT_TABLE_BYTES:
            raise UnsupportedImage(path, f"a snapshot table of {nbytes} bytes, limit {layout.MAX_SNAPSHOT_TABLE_BYTES}")
        return cls(found, nbytes)


def pack_snapshots(snapshots: Iterable[Snapshot]) -> bytes:
    """The snapshot table as it stands on disk: each entry begins at a multiple of 8."""
    table = bytearray()
    for each in snapshots:
        table += bytes(-len(table) % 8)
        table += each.record.pack() + each.extra + os.fsencode(each.id) + os.fsencode(each.name)
    return bytes(table)


def new_snapshot(
    table: SnapshotTable, name: str, date_ns: int, l1_offset: int, l1_size: int, disk_size: int
) -> Snapshot:
    """What *table* would say of another snapshot, without VM state, whose L1 table is at *l1_offset*.

    Raises: ValueError for a name that is too long, or none, or has a zero byte.
    """
    nbytes = len(os.fsencode(name))
    if not 0 < nbytes <= MAX_NAME_BYTES:
        raise ValueError(f"snapshot name of {nbytes} bytes, limit {MAX_NAME_BYTES}, and not empty")
    if "\0" in name:
        raise ValueError(f"snapshot name {name!r} has a zero byte")
    numbers = [int(each.id) for each in table.snapshots if each.id.isascii() and each.id.isdigit()]
    snapshot_id = str(max(numbers, default=0) + 1)
    extra = SNAPSHOT_EXTRA.pack(0, disk_size, 0)
    seconds, nanoseconds = divmod(date_ns, 1_000_000_000)
    record = SnapshotRecord(l1_offset, l1_size, len(snapshot_id), nbytes, seconds, nanoseconds, 0, 0, len(extra))
    return Snapshot(record, snapshot_id, name, 0, disk_size, 0, extra)


@dataclass(frozen=True, slots=True)
class Choice:
    """The first snapshot that has this id, this name, or both."""

    id: str | None = None
    name: str | None = None

    def is_met_by(self, snapshot: Snapshot) -> bool:
        """Whether *snapshot* has what is asked for."""
        return self.id in (None, snapshot.id) and self.name in (None, snapshot.name)


def find_snapshot(path: str, table: SnapshotTable, wanted: str | Choice, *, by_id: bool = True) -> Snapshot:
    """The first snapshot whose id, with *by_id*, or else whose name is *wanted*.

    Raises: FileNotFoundError; TypeError for what is neither: None would choose any.
    """
    if not isinstance(wanted, str | Choice):
        raise TypeError(f"a snapshot is chosen by its id or name, not by {wanted!r}")
    choices = [wanted] if isinstance(wanted, Choice) else [Choice(id=wanted)] * by_id + [Choice(name=wanted)]
    found = [each for choice in choices for each in table.snapshots if choice.is_met_by(each)]
    if not found:
        raise FileNotFoundError(errno.ENOENT, f"snapshot {wanted!r} not found", path)
    return found[0]


def require_sizes(path: str, table: SnapshotTable) -> None:
    """Raises: UnsupportedImage if the disk of a snapshot is as long as the image's, whose size is about to change."""
    for each in table.snapshots:
        if not each.is_complete:
            message = f"snapshot {each.name!r} does not say how long its disk is, and would change with it"
            raise UnsupportedImage(path, f"{message}: see qcow2 check -r all")


def require_possible(path: str, snapshot: Snapshot, record: HeaderRecord) -> None:
    """Raises: UnsupportedImage if the L1 table of *snapshot*, or the one that its disk needs, is beyond the limit."""
    needed = refusal.l1_entries(snapshot.disk_size, record.cluster_bits, record.entry_size)
    nbytes = max(snapshot.record.l1_size, needed) * layout.ENTRY_SIZE
    if nbytes > layout.MAX_L1_BYTES:
        message = f"snapshot {snapshot.name!r}, of a disk of {snapshot.disk_size} bytes, has an L1 table of {nbytes}"
        raise UnsupportedImage(path, f"{message} bytes, limit {layout.MAX_L1_BYTES}")


def is_cut_short(snapshot: Snapshot, record: HeaderRecord) -> bool:
    """Whether the L1 table of *snapshot*, which says how long its disk is, does not map all of that."""
    needed = refusal.l1_entries(snapshot.disk_size, record.cluster_bits, record.entry_size)
    return snapshot.is_complete and snapshot.record.l1_size < needed


async def read_snapshots(file: File, header: Header) -> SnapshotTable:
    """Read the snapshot table that *header* points at.

    Raises: CorruptImage if it cannot lie there or leaves the file; UnsupportedImage beyond the limits.
    """
    start = end = header.record.snapshots_offset
    file_size = await Size(file)
    refusal.validate_snapshots(file, header.record, file_size)
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


async def count_snapshots(file: File, header: Header, limit: int) -> tuple[int, bool]:
    """How many snapshots the table has that *header* points at, whatever it says, of *limit* at most; if it ends there.

    Behind the last one nothing but zeros is in its cluster.
    """
    size, file_size, start = header.cluster_size, await Size(file), header.record.snapshots_offset
    if not start or start % size or start >= file_size:
        return 0, False
    count, end = 0, start
    while count < limit and end < file_size:
        try:
            snapshot, stop = await _read_snapshot(file, header, end + -end % 8, count)
        except UnsupportedImage:
            break
        record = snapshot.record
        l1_end = record.l1_table_offset + record.l1_size * layout.ENTRY_SIZE
        if not record.l1_table_offset or record.l1_table_offset % size or max(stop, l1_end) > file_size:
            break
        count, end = count + 1, stop
    return count, bool(end % size) and not any(await Read(file, end, -end % size))


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
        (disk_size if len(extra) >= 16 else header.record.size) // SECTOR_SIZE * SECTOR_SIZE,
        icount if len(extra) >= 24 else None,
        extra,
    )
    return snapshot, offset + SnapshotRecord.FORMAT.size + nbytes
