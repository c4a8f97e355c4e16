"""Internal snapshots made, gone back to and deleted, while nothing else is under way.

No death leaves a COPIED flag at a cluster that counts more than one, nor a count that is too low: flags go before
counts rise, counts rise before a table that needs them is pointed at, and fall after it is not; flags come back last.
In between the dirty bit is set, so that the next open repairs leaks and missing flags, also those of a change that
failed and could not be taken back; in version 2 the latter cost a copy at worst. Each change is one write of the
header; what it points at is stable before (law 6).
"""

from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from qcow2.driver.operation import Read, Size
from qcow2.engine.bitmapheader import require_size
from qcow2.engine.metadata import snapshot_clusters
from qcow2.engine.opened import Found, Opened
from qcow2.engine.part import Part
from qcow2.engine.rollback import Rollback
from qcow2.engine.root import Root, Unsound
from qcow2.engine.space import Space
from qcow2.error import CorruptImage, UnsupportedImage
from qcow2.format.layout import ENTRY_SIZE
from qcow2.format.refusal import l1_entries
from qcow2.format.snapshot import (
    Snapshot,
    SnapshotTable,
    is_cut_short,
    new_snapshot,
    pack_snapshots,
    require_possible,
    require_sizes,
)
from qcow2.plane.entry import bytes_of, l1_flagged, l1_is_sound, l1_shared, l1_table, words_of
from qcow2.plane.tally import Role, Tally

STEP = 1 << 16  # references that are let go of at a time


class Snapshots(Part):
    """The snapshots of one image that is open for writing."""

    def __init__(self, opened: Opened, root: Root, space: Space, found: Found) -> None:
        super().__init__(opened, root, space)
        self._uncounted = space.uncounted
        self.table = found.snapshots
        self._owned = found.owned_by_snapshots

    async def create(self, name: str, date_ns: int) -> Snapshot:
        """Keep what the disk holds as the snapshot *name*, made *date_ns* nanoseconds after 1970; stable on return.

        Raises: ValueError, UnsupportedImage, CorruptImage; OSError, EINVAL if refcounts are too narrow.
        """
        l1 = l1_shared(self._mapping.l1)
        tree = await self.count(l1)
        await self._require_room(tree)
        areas, unsound = list[range](), Unsound(self._root)
        async with Rollback(self._undo, (areas, unsound)):
            areas.append(await self._write_area(bytes_of(l1)))
            offset = areas[0].start << self._geometry.cluster_bits
            snapshot = new_snapshot(self.table, name, date_ns, offset, len(l1), self._geometry.size)
            table = SnapshotTable.of((*self.table.snapshots, snapshot), self._file.path)
            areas.append(await self._write_area(pack_snapshots(table.snapshots)))
            owned = await self._owned_by_all(table, areas[-1])
            await unsound.begin()
            await self._share(l1)
            await self._raise(tree)
        await self._publish(table, areas[-1], owned)
        await self._end_unsound(unsound)
        return snapshot

    async def apply(self, snapshot: Snapshot) -> None:
        """Let the disk hold what it held when *snapshot* was made; stable on return.

        Raises: UnsupportedImage, CorruptImage, OSError.
        """
        self._require_applicable(snapshot)
        l1 = await self._l1_of(snapshot)
        if is_cut_short(snapshot, self._root.header.record):
            message = f"L1 table of snapshot {snapshot.name!r} is too short for {snapshot.disk_size} bytes"
            raise CorruptImage(self._file.path, snapshot.record.l1_table_offset, message)
        nentries = max(len(l1), l1_entries(snapshot.disk_size, self._geometry.cluster_bits, self._geometry.entry_size))
        l1.extend([0] * (nentries - len(l1)))
        tree, old = await self.count(l1), await self.count(self._mapping.l1)
        await self._require_room(tree)
        areas, unsound = list[range](), Unsound(self._root)
        async with Rollback(self._undo, (areas, unsound)):
            areas.append(await self._write_area(bytes_of(l1)))
            await unsound.begin()
            await self._share(l1, is_active=False)
            await self._raise(tree)
        await self._switch(snapshot, l1, areas[0])
        with suppress(OSError):  # the disk is the other one: what cannot be done yet is left to a repair
            await self.let_go(old)
            await self._end_unsound(unsound)

    async def delete(self, snapshot: Snapshot) -> None:
        """Forget *snapshot*; what it alone held is free. Stable on return. Raises: CorruptImage, OSError."""
        l1 = await self._l1_of(snapshot)
        tree = await self.count(l1)
        table = SnapshotTable.of([each for each in self.table.snapshots if each is not snapshot], self._file.path)
        area, unsound = await self._write_area(pack_snapshots(table.snapshots)), Unsound(self._root)
        async with Rollback(self._undo, ([area], unsound)):
            owned = await self._owned_by_all(table, area)
            await unsound.begin()
            await self._stability.sync()
        await self._publish(table, area, owned)
        await self._reaper.free(self._clusters(snapshot.record.l1_table_offset, len(l1) * ENTRY_SIZE))
        with suppress(OSError):  # it is gone
            await self.let_go(tree)
            await self._correct_copied()
            await self._end_unsound(unsound)

    def _require_applicable(self, snapshot: Snapshot) -> None:
        header = self._root.header
        if header.record.version < 3 and snapshot.disk_size != self._geometry.size:
            message = f"snapshot {snapshot.name!r} is of a disk of {snapshot.disk_size} bytes, which version 2 cannot"
            raise UnsupportedImage(self._file.path, f"{message} go back to")
        if snapshot.disk_size != self._geometry.size:
            require_sizes(self._file.path, self.table)
            require_size(self._file, header, snapshot.disk_size)

    async def _l1_of(self, snapshot: Snapshot) -> "array[int]":
        """The L1 table of *snapshot*, its flags left out: they are of another time."""
        require_possible(self._file.path, snapshot, self._root.header.record)
        record = snapshot.record
        nbytes = record.l1_size * ENTRY_SIZE
        if record.l1_table_offset % self._geometry.cluster_size or record.l1_table_offset + nbytes > await self._end():
            message = f"L1 table of snapshot {snapshot.name!r} cannot lie at {record.l1_table_offset:#x}"
            raise CorruptImage(self._file.path, record.l1_table_offset, message)
        return l1_shared(words_of(await Read(self._file, record.l1_table_offset, nbytes)))

    async def _end(self) -> int:
        size: int = await Size(self._file)
        return size

    async def count(self, l1: "array[int]") -> Tally:
        """What the L2 tables of *l1*, and these, refer to. Raises: CorruptImage."""
        geometry = self._geometry
        end = await self._end()
        tally = Tally(geometry.clusters(end), self._mapping.entries, end)
        for index, table in self._tables(l1):
            if table % geometry.cluster_size or table >= end or tally.has(table >> geometry.cluster_bits, Role.L2):
                raise CorruptImage(self._file.path, table, f"L1 entry {index} is invalid: {l1[index]:#018x}")
            tally.add(table >> geometry.cluster_bits, 1, Role.L2)
            found = tally.add_l2(await Read(self._file, table, geometry.cluster_size), 1)
            if found.suspects:
                where = table + found.suspects[0] * geometry.entry_size
                raise CorruptImage(self._file.path, where, f"L2 entry at {where:#x} is invalid")
        return tally

    async def _require_room(self, tree: Tally) -> None:
        async with self._refcounts.mutex.hold():
            await self._refcounts.require_room(tree)

    @staticmethod
    def _tables(l1: "array[int]") -> Iterator[tuple[int, int]]:
        """Index and host offset of each L2 table."""
        return ((index, l1_table(entry)) for index, entry in enumerate(l1) if l1_table(entry))

    async def _write_area(self, content: bytes) -> range:
        """*content* in clusters of its own, stable after the next sync; none for none."""
        if not content:
            return range(0)
        area = await self._allocator.allocate_area(self._geometry.clusters(len(content)))
        async with Rollback(self._reaper.free, area):
            await self._stability.write(area.start << self._geometry.cluster_bits, content)
        return area

    def _clusters(self, host_offset: int, nbytes: int) -> range:
        return range(host_offset >> self._geometry.cluster_bits, self._geometry.clusters(host_offset + nbytes))

    async def _share(self, l1: "array[int]", *, is_active: bool = True) -> None:
        """Clear every COPIED flag below *l1*, stable on return; and in the active L1 table, if it has its entries."""
        try:
            if is_active:
                await self._mapping.change_l1(l1)
            for _, table in self._tables(l1):
                old = await Read(self._file, table, self._geometry.cluster_size)
                await self._stability.change(table, old, self._mapping.entries.shared(old))
            await self._stability.sync()
        finally:
            self._mapping.cache.resize()  # forget the entries as they were

    async def _raise(self, tree: Tally) -> None:
        """Count what *tree* counts once more, stable on return."""
        async with self._refcounts.mutex.hold():
            await self._refcounts.raise_by(tree)
            try:
                await self._stability.sync()
            except (OSError, MemoryError):  # also one that was not even tried, after which all goes on
                await self._refcounts.take_back(tree)
                raise

    async def _owned_by_all(self, table: SnapshotTable, area: range) -> "array[int]":
        """The clusters of *table*, which lies in *area*, and of the tables of its snapshots.

        Raises: OSError; UnsupportedImage if that is more than a writer would open.
        """
        record = replace(self._root.header.record, snapshots_offset=area.start << self._geometry.cluster_bits)
        return await snapshot_clusters(self._file, self._geometry, record, table, await self._end())

    async def _publish(self, table: SnapshotTable, area: range, owned: "array[int]") -> None:
        """Let the header point at *table*, which lies in *area*, stable; the old one is freed.

        *owned*: the clusters of all tables then.
        """
        record = self._root.header.record
        old = self._clusters(record.snapshots_offset, self.table.nbytes) if self.table.nbytes else range(0)
        await self._root.set_snapshots(len(table.snapshots), area.start << self._geometry.cluster_bits)
        self.table = table
        self._mapping.disown_metadata(self._owned)
        self._mapping.own_metadata(owned)
        self._owned = owned
        await self._reaper.free(old)

    async def _switch(self, snapshot: Snapshot, l1: "array[int]", area: range) -> None:
        """Let the disk be what *l1*, stable in *area*, maps; the old L1 table is freed."""
        mapping, bits = self._mapping, self._geometry.cluster_bits
        old = self._clusters(mapping.l1_offset, len(mapping.l1) * ENTRY_SIZE)
        lost = [*old, *(table >> bits for _, table in self._tables(mapping.l1))]
        await self._root.set_disk(snapshot.disk_size, area.start << bits, len(l1))
        mapping.disown_metadata(lost)
        mapping.own_metadata([*area, *(table >> bits for _, table in self._tables(l1))])
        mapping.move_l1(l1, area.start << bits)
        self._geometry.size = snapshot.disk_size
        mapping.cache.resize()
        await self._reaper.free(old)

    async def let_go(self, tree: Tally) -> None:
        """Take back what *tree* counts, stable on return; what cannot be is left to the next open's repair."""
        self._reaper.has_dropped = False
        batch: list[int] = []
        for cluster in tree.clusters(Role.L2 | Role.DATA):
            batch += [cluster] * tree.count(cluster)
            if len(batch) >= STEP:
                await self._reaper.free(batch)
                await self._reaper.drain()
                batch = []
        await self._reaper.free(batch)
        await self._reaper.drain()
        self._stability.require_trust()
        self._refcounts.are_too_high |= self._reaper.has_dropped
        await self._stability.sync()

    async def _undo(self, made: tuple[list[range], Unsound]) -> None:
        """Nothing was published: what was written for it is free, and counts are as they were."""
        areas, unsound = made
        if self._stability.error is None:
            for area in areas:
                await self._reaper.free(area)
            await self._correct_copied()
            await self._end_unsound(unsound)

    async def _end_unsound(self, unsound: Unsound) -> None:
        """Flags and counts are right again, unless they could not be taken back."""
        if not self._refcounts.are_too_high:
            await unsound.end()

    async def _correct_copied(self) -> None:
        """Set the COPIED flag of what counts one, and of nothing else, in the active tables; stable on return.

        What a table counts says nothing of its entries: if it is too high, data below it may still count one.
        """
        try:
            async with self._refcounts.mutex.hold():
                await self._refcounts.write_all()  # those of a write that failed may be in memory alone
            await self._stability.sync()  # no flag is set before its count is one
            l1 = self._mapping.l1
            bits = self._geometry.cluster_bits
            new = l1_flagged(l1, await self._alone([table >> bits for _, table in self._tables(l1)]), bits)
            for _, table in self._tables(array("Q", filter(self._is_possible, new))):
                old = await Read(self._file, table, self._geometry.cluster_size)
                entries = self._mapping.entries
                flagged = entries.flagged(old, await self._alone(entries.clusters(old)))
                await self._stability.change(table, old, flagged)
            await self._mapping.change_l1(new)
            await self._stability.sync()
        finally:
            self._mapping.cache.resize()

    def _is_possible(self, entry: int) -> bool:
        """Whether an L1 *entry* leads to a place where a table can be."""
        return l1_is_sound(entry, self._geometry.cluster_size) and l1_table(entry) < self._mapping.file_end

    async def _alone(self, clusters: list[int]) -> set[int]:
        """Those of the host *clusters* that count one, and no less than they are referenced, as far as is known."""
        async with self._refcounts.mutex.hold():
            alone = await self._refcounts.last_references(set(clusters))  # two entries may share a cluster
            return set(alone) - await self._uncounted.among(alone)
