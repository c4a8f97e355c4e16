"""Replay: a killed process's waiting links, out of its log and into the image, before anything else is written.

Restartable: until the log is gone every replay ends in the same place. A log is input: only what it can have said of
this image, as it is, is done.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from qcow2.driver.operation import File, Read, Size, Sync, Write
from qcow2.engine.bitmaptable import load_bitmaps
from qcow2.engine.metadata import snapshot_clusters, table_clusters
from qcow2.error import CorruptImage, ImageError, UnsupportedImage
from qcow2.format.geometry import Geometry
from qcow2.format.header import Header
from qcow2.format.layout import ENTRY_SIZE, SECTOR_SIZE, HeaderRecord
from qcow2.format.snapshot import read_snapshots
from qcow2.plane.entry import Entries, l1_is_private, l1_is_sound, l1_table, words_of
from qcow2.plane.linklog import MARK_OFFSET, NO_MARK, Link


class Outcome(NamedTuple):
    """What became of a log."""

    replayed: int = 0
    dropped: int = 0  # links that contradict the image


async def replay(file: File, header: Header, links: Iterable[Link], data_file: File | None = None) -> Outcome:
    """Bring *links*, which waited, into the image in *file*, locked for writing; then none does. Stable on return.

    What they lead to may be in another file, *data_file*. The log may be removed then, and only then. Refcounts are
    not looked at: a host cluster that a link leaves stays counted, a leak.
    Raises: OSError, UnsupportedImage, CorruptImage.
    """
    target = await Target.of(file, header)
    links = list(links)
    if links and data_file is None and target.geometry.has_data_file:
        raise UnsupportedImage(file.path, "writes wait in its link log, and its external data file is not open")
    old: dict[int, list[int]] = {}  # a cluster that waits again has been any of them
    for link in links:
        old.setdefault(link.cluster, []).append(link.old_entry)
    links, dropped = target.accept(links)
    wanted: list[Link] = []
    replayed = 0
    for first, group in by_slice(target.geometry, links):
        entries = target.entries.unpack(await Read(file, target.entry_offset(first), target.geometry.slice_bytes))
        for link in group:
            entry = entries[link.cluster % len(entries)]
            if any(target.entries.is_alike(entry, each) for each in old[link.cluster]):
                replayed += 1
            elif entry != link.new_entry:
                dropped += 1
                continue
            wanted.append(link)  # also what is there: the sync of a replay before this one may have failed
    await _write(file, file if data_file is None else data_file, target, wanted)
    await clear_mark(file)
    return Outcome(replayed, dropped)


async def are_in(file: File, header: Header, links: Iterable[Link]) -> bool:
    """Whether each of *links* is in the image in *file* already: who brought them in may have died at once.

    Raises: OSError.
    """
    target = await Target.of(file, header)
    accepted, dropped = target.accept(links)
    for first, group in by_slice(target.geometry, accepted):
        entries = target.entries.unpack(await Read(file, target.entry_offset(first), target.geometry.slice_bytes))
        dropped += sum(entries[link.cluster % len(entries)] != link.new_entry for link in group)
    return dropped == 0


async def clear_mark(file: File) -> None:
    """Let the image in *file* say that no link of it waits; stable on return."""
    await Write(file, MARK_OFFSET, NO_MARK)
    await Sync(file)


async def _write(file: File, data_file: File, target: "Target", links: list[Link]) -> None:
    """First what they rest on: a sync of the dead process may have failed, and the host think it written since."""
    end = await Size(data_file)
    for link in links:
        host_offset = target.entries.host_offset(link.new_entry)
        nbytes = min(target.geometry.cluster_size, max(0, end - host_offset))  # a data file may end in the cluster
        await _write_back(data_file, host_offset, nbytes)
    for offset in target.sectors_under(links):
        await _write_back(file, offset, SECTOR_SIZE)
    if data_file is not file:
        await Sync(data_file)
    await Sync(file)
    for link in links:
        await Write(file, target.entry_offset(link.cluster), target.entries.pack([link.new_entry]))
    await Sync(file)


async def _write_back(file: File, host_offset: int, nbytes: int) -> None:
    await Write(file, host_offset, await Read(file, host_offset, nbytes))


def by_slice(geometry: Geometry, links: Iterable[Link]) -> Iterator[tuple[int, list[Link]]]:
    """*links* by the slice that maps them: (its first guest cluster, links)."""
    per_slice = geometry.slice_bytes // geometry.entry_size
    groups: dict[int, list[Link]] = {}
    for link in links:
        groups.setdefault(link.cluster // per_slice * per_slice, []).append(link)
    yield from sorted(groups.items())


@dataclass(slots=True)
class Target:
    """As much of the image as says which links it can take."""

    geometry: Geometry
    entries: Entries
    l1: "list[int]"
    blocks: "list[int]"  # the refcount table
    record: HeaderRecord
    file_end: int
    tables: set[int]  # host clusters of the header and of all tables, those of snapshots too
    metadata: set[int]  # those, and the clusters of bitmaps

    @classmethod
    async def of(cls, file: File, header: Header) -> "Target":
        """The image in *file*, dirty or not."""
        record = header.record
        geometry = Geometry.of(record)
        file_size = await Size(file)
        l1 = words_of(await Read(file, record.l1_table_offset, record.l1_size * ENTRY_SIZE))
        blocks = words_of(await Read(file, record.refcount_table_offset, record.refcount_table_nbytes))
        tables = set(table_clusters(geometry, header, l1, blocks))
        with suppress(ImageError):  # the open refuses it
            tables.update(
                await snapshot_clusters(file, geometry, record, await read_snapshots(file, header), file_size)
            )
        owned: Iterable[int] = ()
        with suppress(CorruptImage):
            _, owned = await load_bitmaps(file, header, geometry, tables.__contains__)
        return cls(
            geometry,
            Entries.of(geometry),
            list(l1),
            list(blocks),
            record,
            geometry.round_up(file_size),
            tables,
            tables.union(owned),
        )

    def accept(self, links: Iterable[Link]) -> tuple[list[Link], int]:
        """Those of *links* that may be true, the newest of each guest cluster; and how many may not."""
        newest = {link.cluster: link for link in links}
        taken: set[int] = set()
        accepted = []
        for link in newest.values():
            host_offset = self.entries.host_offset(link.new_entry)
            if self._has_place(link.cluster) and self._is_data(link) and host_offset not in taken:
                taken.add(host_offset)
                accepted.append(link)
        return accepted, len(newest) - len(accepted)

    def _has_place(self, cluster: int) -> bool:
        """Whether a private L2 table maps guest *cluster*."""
        if cluster >= self.geometry.clusters(self.geometry.size):
            return False
        entry = self.l1[cluster << self.geometry.cluster_bits >> self.geometry.table_bits]
        return (
            l1_is_private(entry) and l1_is_sound(entry, self.geometry.cluster_size) and l1_table(entry) < self.file_end
        )

    def _is_data(self, link: Link) -> bool:
        """Whether the entry of *link* names a host cluster that data can be in."""
        entry = link.new_entry
        offset = self.entries.host_offset(entry)
        if self.geometry.has_data_file:
            own = self.entries.data(link.cluster << self.geometry.cluster_bits)[0]
            is_named = self.entries.has_cluster(entry) and self.entries.is_own(entry, own)
            return is_named and not any(self.entries.contradictions(entry))
        is_there = self.entries.is_data(entry) and offset < self.file_end
        return is_there and self.geometry.cluster_of(offset) not in self.metadata

    def sectors_under(self, links: Iterable[Link]) -> list[int]:
        """Offsets of the sectors that lead to the L2 tables of *links*, and that count their host clusters."""
        places = set[int]()
        for link in links:
            index = self.geometry.l1_index(link.cluster << self.geometry.cluster_bits)
            places.add(self.record.l1_table_offset + index * ENTRY_SIZE)
            if not self.geometry.has_data_file:
                places.update(self._count_places(self.geometry.cluster_of(self.entries.host_offset(link.new_entry))))
        return sorted({place - place % SECTOR_SIZE for place in places})

    def _count_places(self, cluster: int) -> Iterator[int]:
        bits = self.geometry.block_bits
        block = self.blocks[cluster >> bits] if cluster >> bits < len(self.blocks) else 0
        if 0 < block < self.file_end:
            yield self.record.refcount_table_offset + (cluster >> bits) * ENTRY_SIZE
            yield block + (cluster % (1 << bits) << self.record.refcount_order) // 8

    def entry_offset(self, cluster: int) -> int:
        """Where in the file the L2 entry of guest *cluster* is."""
        guest_offset = cluster << self.geometry.cluster_bits
        table = l1_table(self.l1[self.geometry.l1_index(guest_offset)])
        return table + self.geometry.entry_offset(guest_offset)
