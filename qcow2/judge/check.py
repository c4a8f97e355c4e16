"""The judge: what an image references, against what it says it references. Changes nothing."""

from array import array
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

from qcow2.driver.operation import File, Read
from qcow2.format.header import read_header
from qcow2.format.layout import ENTRY_SIZE
from qcow2.judge.census import Census, Progress, take_census
from qcow2.judge.report import Report
from qcow2.plane.entry import Entries
from qcow2.plane.tally import Role, stored_refcount, used_entries


@dataclass
class Verdict:
    """A judged image, with what its repair needs to know."""

    census: Census
    wrong_blocks: "array[int]" = field(default_factory=lambda: array("Q"))  # refcount table indexes, ascending

    @property
    def report(self) -> Report:
        """The findings."""
        return self.census.report


async def check(file: File, *, say: Callable[[str], None] | None = None, progress: Progress | None = None) -> Report:
    """Check the image in *file*, which nobody writes to meanwhile.

    Raises: UnsupportedImage, CorruptImage if it cannot be opened or some tables cannot be found at all.
    """
    return (await judge(file, Report(say), progress)).report


async def judge(file: File, report: Report, progress: Progress | None = None) -> Verdict:
    """Check the image and keep the counts."""
    header = await read_header(file, trust_refcounts=False)
    report.is_dirty = header.is_dirty
    census = await take_census(file, header, report, progress)
    verdict = Verdict(census)
    await _compare(verdict)
    if census.has_short_table and report.leaks:
        report.is_dark = True
        report.tell("the file ends inside a table, which may have referred to what seems to be leaked")
    await _judge_copied(census)
    for cluster in census.tally.overlaps():
        report.corruption(f"tables overlap at {cluster << census.record.cluster_bits:#x}")
    return verdict


async def _compare(verdict: Verdict) -> None:
    """Find every cluster whose stored refcount is not the number of its references."""
    census = verdict.census
    end = 0
    for index in block_indexes(census):
        first = index * census.per_block
        block = await read_block(census, index)
        in_file = min(census.per_block, max(0, census.file_clusters - first))
        if block is not None and (used := used_entries(block, census.record.refcount_order, in_file)):
            end = first + used
        if _compare_block(census, block, first):
            verdict.wrong_blocks.append(index)
            census.must_rebuild |= block is None
    end = max(end, census.tally.end(census.file_clusters))
    census.report.image_end_offset = end << census.record.cluster_bits


def block_indexes(census: Census) -> list[int]:
    """Indexes, ascending, of the refcount blocks there are and of those there should be for what is referenced."""
    listed = (index for index, offset in enumerate(census.blocks) if offset)
    return sorted({*listed, *_referenced_indexes(census)})


def _referenced_indexes(census: Census) -> Iterator[int]:
    per_block = census.per_block
    cluster = census.tally.next(0)
    while cluster is not None:
        index = cluster // per_block
        yield index
        cluster = census.tally.next((index + 1) * per_block)


async def read_block(census: Census, index: int) -> bytes | None:
    """The refcount block with that index, None where there is no sound one."""
    if index >= len(census.blocks) or not census.blocks[index]:
        return None
    block: bytes = await Read(census.file, census.blocks[index], census.cluster_size)
    return block


def _compare_block(census: Census, block: bytes | None, first: int) -> bool:
    """Compare one block; true if it is wrong.

    Counts past the end of the file cost nothing: clusters reserved there by a writer that died are no finding.
    """
    report, order = census.report, census.record.refcount_order
    found = census.tally.sum_differences(block, order, first, census.per_block, census.file_clusters)
    report.corruptions += found.too_low
    report.leaks += found.too_high
    if found.too_low or found.too_high:
        _say_differences(census, block, first)
    return found.differing > 0


def _say_differences(census: Census, block: bytes | None, first: int) -> None:
    """Name the clusters that a block counts wrong, as long as anybody listens."""
    order = census.record.refcount_order
    for cluster in census.tally.differing(block, order, first, census.per_block):
        if cluster >= census.file_clusters or census.report.say is None:
            return
        stored, counted = stored_refcount(block, order, cluster - first), census.tally.count(cluster)
        kind = "ERROR" if stored < counted else "Leaked"
        census.report.tell(f"{kind} cluster {cluster} refcount={stored} reference={counted}")


L1_ENTRIES = Entries(16, 3)  # as far as flags go, those of every L1 table


@dataclass(frozen=True, slots=True)
class Miscopied:
    """A piece of an active table, at most a cluster, with entries whose COPIED flag is wrong."""

    is_l1: bool
    host_offset: int
    data: bytes
    indexes: list[int]
    entries: Entries  # of the table


async def miscopied(census: Census, *, counted: bool) -> AsyncIterator[Miscopied]:
    """Find COPIED flags of the active image that contradict the stored refcounts or, *counted*, ours."""
    record = census.record
    l1_bytes = record.l1_size * ENTRY_SIZE
    for start in range(0, l1_bytes, census.cluster_size):
        host_offset = record.l1_table_offset + start
        data = await Read(census.file, host_offset, min(census.cluster_size, l1_bytes - start))
        if indexes := census.tally.miscopied(data, is_l1=True, counted=counted):
            yield Miscopied(True, host_offset, data, indexes, L1_ENTRIES)
    if record.has_data_file:  # no refcount is of its clusters
        return
    for cluster in census.tally.clusters(Role.ACTIVE):
        host_offset = cluster << record.cluster_bits
        data = await Read(census.file, host_offset, census.cluster_size)
        if indexes := census.tally.miscopied(data, is_l1=False, counted=counted):
            yield Miscopied(False, host_offset, data, indexes, census.tally.entries)


def is_table_alone(census: Census, cluster: int) -> bool:
    """Whether *cluster* holds L2 tables only, or else one piece of another table."""
    if census.tally.has(cluster, Role.L2):
        return not census.tally.has(cluster, Role.SINGLE | Role.DATA)
    return not census.tally.has(cluster, Role.DATA) and census.tally.count(cluster) == 1


async def _judge_copied(census: Census) -> None:
    async for found in miscopied(census, counted=False):
        census.report.corruptions += len(found.indexes)
        for index in found.indexes:
            if census.report.say is None:
                break
            entry = found.entries.at(found.data, index)
            word = found.entries.pack([entry])[:ENTRY_SIZE].hex().lstrip("0")
            count = await _stored_count(census, census.cluster_of(found.entries.host_offset(entry)))
            if found.is_l1:
                number = (found.host_offset - census.record.l1_table_offset) // ENTRY_SIZE + index
                what = f"L2 cluster: l1_index={number} l1_entry={word}"
            else:
                what = f"data cluster: l2_entry={word}"
            census.report.tell(f"ERROR OFLAG_COPIED {what} refcount={count}")


async def _stored_count(census: Census, cluster: int) -> int:
    """What the refcounts say of *cluster*."""
    index, inside = divmod(cluster, census.per_block)
    return stored_refcount(await read_block(census, index), census.record.refcount_order, inside)
