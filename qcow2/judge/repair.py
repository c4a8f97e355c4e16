"""Refcounts rebuilt and COPIED flags put right, from nothing but what the image references.

Restartable: whatever was written when it died, the next repair counts again and ends in the same place. A new refcount
structure goes to free clusters and is stable before the header points at it; the dirty bit is cleared last.
"""

import struct
from collections.abc import Callable
from dataclasses import replace
from enum import Enum

from qcow2.driver.operation import File, Read, Resize, Size, Write
from qcow2.error import CorruptImage, UnsupportedImage
from qcow2.format import layout
from qcow2.format.header import Header, clear_autoclear, make_stable, mark_repaired, read_header
from qcow2.format.layout import ENTRY_SIZE, SECTOR_SIZE, Autoclear
from qcow2.judge.census import Census, Progress, is_needlessly_askew, misplaced
from qcow2.judge.check import Verdict, block_indexes, is_table_alone, judge, miscopied, read_block
from qcow2.judge.losttable import find_table
from qcow2.judge.report import Report
from qcow2.judge.snapshots import complete_snapshots
from qcow2.judge.writeback import write_back
from qcow2.plane.tally import Role, set_refcount, stored_refcount

MAX_HELD = 1 << 28  # clusters of a file, 5 bytes each, that are kept while something cannot be found
MAX_COUNTED = 1 << 16  # with so many references no wider count is ever needed


class RepairMode(Enum):
    """What to put right."""

    LEAKS = "leaks"  # only refcounts that are too high
    ALL = "all"


async def repair(
    file: File,
    mode: RepairMode = RepairMode.ALL,
    *,
    say: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Repair the image in *file*, which is locked, then check it again; the report is of that second check.

    The dirty and the corrupt bit are cleared, stable on return, if no corruption is left but of what the disk can do
    without; then the file of an image
    that leaked or was dirty ends where the image does.
    Data is not touched. Nothing is written if something lies past the end of the file: it is gone, and zeros in its
    place would pass for it; but a snapshot table that the header misses is looked for. While references cannot be
    followed, what seems to leak may be theirs: counts that are too low are raised, none is lowered, and the structure
    of an image with snapshots is not rebuilt. *progress* is told of each count, of which there may be several, and may
    raise: the next repair goes on then.
    Raises: OSError, UnsupportedImage, CorruptImage.
    """
    before = await judge(file, Report(say), progress)
    found = before.report
    await make_stable(file)  # what a writer that died has changed: no count falls before (law 5), nothing is named (6)
    if mode is RepairMode.ALL and await find_table(before):
        before = await judge(file, Report(), progress)
    if before.census.is_cut_off or not _is_judged(before.census, mode):
        return found
    if before.census.header.is_dirty:
        await write_back(before.census)
    # The clusters of bitmaps were counted; those of features we do not know were not, and are leaks from now on.
    await clear_autoclear(file, before.census.header, maintained=Autoclear.BITMAPS)
    if mode is RepairMode.ALL and before.census.askew:
        await _let_go_of_askew(before.census)
        before = await judge(file, Report(), progress)
    if mode is RepairMode.ALL and before.census.must_complete_snapshots and not found.is_dark:
        await complete_snapshots(before.census)
        before = await judge(file, Report(), progress)
    if mode is RepairMode.ALL and before.census.counted_snapshots is not None and not before.report.is_dark:
        await _correct_snapshots(before.census, before.census.counted_snapshots)
        before = await judge(file, Report(), progress)
    if mode is RepairMode.LEAKS:
        await _adjust_refcounts(before, lower=True)
        await _correct_copied(before.census)
    elif before.report.is_dark and not before.census.must_rebuild:
        await _adjust_refcounts(before, lower=False)
        await _correct_copied((await judge(file, Report(), progress)).census, counted=False)
    else:
        await _repair_all(before)
    after = (await judge(file, Report(), progress)).report
    after.corruptions_fixed = max(0, found.corruptions - after.corruptions)
    after.leaks_fixed = max(0, found.leaks - after.leaks)
    if not after.unsound:
        await mark_repaired(file, await read_header(file))
        after.is_dirty = False
        if found.leaks or before.census.header.is_dirty:
            await _cut_tail(file, after.image_end_offset)
    return after


async def _cut_tail(file: File, end: int) -> None:
    """Give back what a writer that died had set aside past the *end* of what the image, all stable, refers to."""
    if end < await Size(file):
        await Resize(file, end)


async def _repair_all(verdict: Verdict) -> None:
    census = verdict.census
    if not census.record.nb_snapshots and census.record.snapshots_offset % census.cluster_size:
        await Write(census.file, layout.HEADER_SNAPSHOTS_OFFSET, layout.HEADER_SNAPSHOTS.pack(0, 0))
    if census.must_rebuild:
        await _rebuild(census)
    else:
        await _correct_blocks(verdict)
    await _correct_copied(census)
    if census.record.has_data_file:
        await _correct_places(census)


async def _correct_snapshots(census: Census, count: int) -> None:
    """Let the header say how many there are; stable on return."""
    found = layout.HEADER_SNAPSHOTS.pack(count, census.record.snapshots_offset)
    await Write(census.file, layout.HEADER_SNAPSHOTS_OFFSET, found)
    await make_stable(census.file)


async def _let_go_of_askew(census: Census) -> None:
    """Let entries name no host cluster that lies askew where they show zeros, or what is below, anyway."""
    entries = census.tally.entries
    for cluster in filter(lambda each: is_table_alone(census, each), sorted(census.askew)):
        old = await Read(census.file, cluster << census.record.cluster_bits, census.cluster_size)
        table = list(entries.unpack(old))
        for index, entry in enumerate(table):
            if not entries.is_compressed(entry) and is_needlessly_askew(census, entry):
                table[index] = entries.without_cluster(entry) if entries.has_subclusters else entries.zeros
        await _write_difference(census.file, cluster << census.record.cluster_bits, old, entries.pack(table))
    await make_stable(census.file)


async def _correct_places(census: Census) -> None:
    """Let entries lead to their own places in the data file, where there is no doubt what is to be seen there.

    A raw one is the disk, whatever an entry says. Else that is so of an entry that lacks nothing but its flag.
    """
    bits, per_table = census.record.cluster_bits, census.cluster_size // census.record.entry_size
    entries, nclusters = census.tally.entries, -(-census.record.size >> bits)
    for cluster in census.tally.clusters(Role.ACTIVE):
        old = await Read(census.file, cluster << bits, census.cluster_size)
        new, first = bytearray(old), census.table_index[cluster] * per_table
        for index, entry, own in misplaced(census, cluster << bits, old):
            flagged = entries.flipped(entry)
            if entries.is_own(flagged, own) and not any(entries.contradictions(flagged)):
                mended = flagged
            elif census.record.has_raw_data:
                mended = own if first + index < nclusters else 0
            else:
                continue
            new[index * entries.nbytes : (index + 1) * entries.nbytes] = entries.pack([mended])
        if is_table_alone(census, cluster):
            await _write_difference(census.file, cluster << bits, old, new)
    await make_stable(census.file)


def _is_judged(census: Census, mode: RepairMode) -> bool:
    """Whether enough is known for this repair: none of leaks in the dark, nor a new structure that frees snapshots."""
    if not census.report.is_dark:
        return True
    if mode is RepairMode.LEAKS:
        return False
    return not (census.must_rebuild and census.may_miss_shared)


async def _adjust_refcounts(verdict: Verdict, *, lower: bool) -> None:
    """Lower the refcounts that are too high, or else raise those that are too low."""
    census = verdict.census
    order = census.record.refcount_order
    for index in verdict.wrong_blocks:
        old = await read_block(census, index)
        if old is None:
            continue
        new = bytearray(old)
        first = index * census.per_block
        for cluster in census.tally.differing(old, order, first, census.per_block):
            counted = min(census.tally.count(cluster), (1 << (1 << order)) - 1)
            if (stored_refcount(old, order, cluster - first) > counted) is lower:
                set_refcount(new, order, cluster - first, counted)
        await _write_difference(census.file, census.blocks[index], old, new)
    await make_stable(census.file)


async def _correct_blocks(verdict: Verdict) -> None:
    """Put the refcounts right where they are."""
    census = verdict.census
    for index in verdict.wrong_blocks:
        old = await read_block(census, index)
        assert old is not None  # else the structure would be rebuilt
        new = census.tally.pack(census.record.refcount_order, index * census.per_block, census.cluster_size)
        await _write_difference(census.file, census.blocks[index], old, new)
    await make_stable(census.file)


async def _write_difference(file: File, host_offset: int, old: bytes, new: bytes | bytearray) -> None:
    """Write the sectors of *new* that differ from *old*, the neighbours together."""
    sectors = [at for at in range(0, len(new), SECTOR_SIZE) if old[at : at + SECTOR_SIZE] != new[at : at + SECTOR_SIZE]]
    if sectors:
        start, stop = sectors[0], sectors[-1] + SECTOR_SIZE
        await Write(file, host_offset + start, bytes(new[start:stop]))


async def _correct_copied(census: Census, *, counted: bool = True) -> None:
    """Put the flags right, but for those in clusters that guest data or another table claims: they may be no flags."""
    async for found in miscopied(census, counted=counted):
        if not is_table_alone(census, census.cluster_of(found.host_offset)):
            continue
        new = bytearray(found.data)
        found.entries.flip(new, found.indexes)
        await _write_difference(census.file, found.host_offset, found.data, new)
    await make_stable(census.file)


async def _rebuild(census: Census, progress: Progress | None = None) -> Header:
    """Write a whole new refcount structure to free clusters, then let the header point at it."""
    if census.report.is_dark:
        _hold_unreferenced(census)
    start, table_clusters, indexes = _place(census)
    _forget_old_structure(census)
    bits = census.record.cluster_bits
    census.tally.add(start, table_clusters + len(indexes), Role.SINGLE)
    table = [0] * (table_clusters * census.cluster_size // ENTRY_SIZE)
    for done, index in enumerate(indexes):
        where = start + table_clusters + done
        table[index] = where << bits
        block = census.tally.pack(census.record.refcount_order, index * census.per_block, census.cluster_size)
        await Write(census.file, where << bits, block)
        if progress is not None:
            progress(done + 1, len(indexes))
    await Write(census.file, start << bits, struct.pack(f">{len(table)}Q", *table))
    await make_stable(census.file)
    await _point_at(census, start << bits, table_clusters)
    record = replace(census.record, refcount_table_offset=start << bits, refcount_table_clusters=table_clusters)
    return replace(census.header, record=record)


async def _point_at(census: Census, table_offset: int, table_clusters: int) -> None:
    """Let the header point at another refcount table, and say how wide its counts are: one sector. Stable on return."""
    sector = bytearray(await Read(census.file, 0, SECTOR_SIZE))
    layout.HEADER_REFCOUNT_TABLE.pack_into(sector, layout.HEADER_REFCOUNT_TABLE_OFFSET, table_offset, table_clusters)
    if census.record.version >= 3:
        order = census.record.refcount_order
        layout.HEADER_REFCOUNT_ORDER.pack_into(sector, layout.HEADER_REFCOUNT_ORDER_OFFSET, order)
    await Write(census.file, 0, bytes(sector))
    await make_stable(census.file)


async def change_width(file: File, refcount_order: int, progress: Progress | None = None) -> None:
    """Give the sound image in *file*, of version 3 and locked, refcounts of another width; stable on return.

    A new structure of them is stable before the header points at it. *progress*, told of each table that was read and
    then of each block that was written, may raise.
    Raises: OSError, ImageError; it is as it was.
    """
    census = await require_width(file, refcount_order, progress)
    census.header = replace(census.header, record=replace(census.record, refcount_order=refcount_order))
    await _rebuild(census, progress)


async def require_width(file: File, refcount_order: int, progress: Progress | None = None) -> Census:
    """Who refers to what in the image in *file*, which can have such refcounts. Raises: OSError, ImageError."""
    census = (await judge(file, Report(), progress)).census
    if census.report.unsound:
        raise CorruptImage(file.path, 0, "not consistent: repair it before its refcounts get another width")
    width, limit = 1 << refcount_order, (1 << (1 << refcount_order)) - 1
    if limit < MAX_COUNTED:
        for cluster in census.tally.clusters(Role.DATA | Role.L2 | Role.SINGLE):
            if (count := census.tally.count(cluster)) > limit:
                where = cluster << census.record.cluster_bits
                message = f"cannot have refcounts of {width} bits: the cluster at {where:#x} has {count}"
                raise UnsupportedImage(file.path, message)
    return census


def _hold_unreferenced(census: Census) -> None:
    """Count each cluster of the file that nothing refers to: it may hold what cannot be found.

    Raises: UnsupportedImage beyond the limit.
    """
    if census.file_clusters > MAX_HELD:
        message = (
            f"{census.file_clusters} clusters would have to be kept, limit {MAX_HELD}: not all references are found"
        )
        raise UnsupportedImage(census.file.path, message)
    cluster = 0
    while cluster < census.file_clusters:
        used = census.tally.next(cluster)
        stop = census.file_clusters if used is None else min(used, census.file_clusters)
        if stop > cluster:
            census.tally.add(cluster, stop - cluster, Role.DATA)
        cluster = stop + 1


def _place(census: Census) -> tuple[int, int, list[int]]:
    """Where the new structure goes: first cluster, clusters of the table, indexes of the blocks behind it.

    It counts itself, so its size depends on its place: grow until it fits.
    """
    per_block = census.per_block
    referenced = {index for index in block_indexes(census) if census.tally.has_any(index * per_block, per_block)}
    nclusters = 1 + len(referenced)
    while True:
        start = census.tally.find_free(nclusters)
        own = range(start // per_block, (start + nclusters - 1) // per_block + 1)
        indexes = sorted(referenced.union(own))
        table_clusters = -(-(indexes[-1] + 1) * ENTRY_SIZE >> census.record.cluster_bits)
        if table_clusters * census.cluster_size > layout.MAX_REFCOUNT_TABLE_BYTES:
            nbytes = table_clusters * census.cluster_size
            message = f"a refcount table of {nbytes} bytes is needed, limit {layout.MAX_REFCOUNT_TABLE_BYTES}"
            raise UnsupportedImage(census.file.path, message)
        if table_clusters + len(indexes) <= nclusters:
            return start, table_clusters, indexes
        nclusters = table_clusters + len(indexes)


def _forget_old_structure(census: Census) -> None:
    """Take the references of the old table and its blocks back: they are free once the header has changed."""
    for cluster in census.old_structure:
        census.tally.add(cluster, 1, Role(0), -1)
