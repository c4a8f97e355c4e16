"""A snapshot table that the header does not lead to, found among the clusters that are counted and not referred to."""

from dataclasses import replace

from qcow2.driver.operation import File, Write
from qcow2.format import layout
from qcow2.format.header import Header, make_stable
from qcow2.format.snapshot import count_snapshots, read_snapshots
from qcow2.judge.census import Census
from qcow2.judge.check import Verdict, read_block
from qcow2.plane.tally import stored_refcount

MAX_LOOKED_AT = 1 << 18  # clusters
MAX_ENTRIES = MAX_LOOKED_AT + 2 * layout.MAX_SNAPSHOTS  # of tables that may be in those


async def find_table(verdict: Verdict) -> bool:
    """Let the header lead to the snapshot table if there is but one place for it; stable on return.

    Or to none, if the refcounts know of nothing besides the disk: then it is the number of snapshots that is wrong.
    False: nothing has changed, for nobody can tell.
    Raises: OSError.
    """
    census = verdict.census
    if not census.lacks_snapshots or census.must_rebuild or census.report.corruptions:
        return False
    held = await _held(verdict)
    if held is None:
        return False
    places = await _places(census, held)
    if places is None:
        return False
    if len(places) == 1:
        await _point_at(census, census.record.nb_snapshots, places[0] << census.record.cluster_bits)
    elif not held and not census.header.is_dirty:
        await _point_at(census, 0, 0)
    else:
        return False
    return True


async def _held(verdict: Verdict) -> list[int] | None:
    """The clusters that are counted and that nothing refers to; None if there are very many."""
    census, held = verdict.census, list[int]()
    order = census.record.refcount_order
    for index in verdict.wrong_blocks:
        block, first = await read_block(census, index), index * census.per_block
        for cluster in census.tally.differing(block, order, first, census.per_block):
            if cluster < census.file_clusters and stored_refcount(block, order, cluster - first):
                held.append(cluster)
        if len(held) > MAX_LOOKED_AT:
            return None
    return held


async def _places(census: Census, held: list[int]) -> list[int] | None:
    """The clusters with a table of as many snapshots as the header says; None if that would take forever to tell."""
    places, room = list[int](), MAX_ENTRIES
    for cluster in held:
        record = replace(census.record, snapshots_offset=cluster << census.record.cluster_bits)
        header = replace(census.header, record=record)
        count, ends = await count_snapshots(census.file, header, min(record.nb_snapshots + 1, layout.MAX_SNAPSHOTS))
        room -= count + 1
        if room < 0:
            return None
        if ends and count == record.nb_snapshots and await _is_named(census.file, header):
            places.append(cluster)
    return places


async def _is_named(file: File, header: Header) -> bool:
    """Whether each snapshot has an id and an L1 table: an L1 table may pass for a nameless one."""
    return all(each.id and each.record.l1_size for each in (await read_snapshots(file, header)).snapshots)


async def _point_at(census: Census, count: int, host_offset: int) -> None:
    await Write(census.file, layout.HEADER_SNAPSHOTS_OFFSET, layout.HEADER_SNAPSHOTS.pack(count, host_offset))
    await make_stable(census.file)
