"""Everything that references a host cluster, walked once and counted; nothing found on the way is believed."""

from array import array
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace

from qcow2.driver.operation import File, Read, Size
from qcow2.error import ImageError, UnsupportedImage
from qcow2.format import layout
from qcow2.format.header import Header
from qcow2.format.layout import ENTRY_SIZE, SECTOR_SIZE, HeaderRecord
from qcow2.format.pieces import pieces
from qcow2.format.snapshot import SIZES_BYTES, Snapshot, count_snapshots, is_cut_short, read_snapshots
from qcow2.judge.bitmaps import count_bitmaps
from qcow2.judge.report import Report
from qcow2.plane.entry import Entries, l1_has_reserved_bits, l1_table, words_of
from qcow2.plane.tally import MAX_CLUSTERS, Role, Tally

Progress = Callable[[int, int], None]  # tables done, of how many
MIN_SLACK = 1024  # clusters past the plausible end that the tally has room for: a new refcount structure goes there
MAX_PAST_END = 1 << 24  # clusters past the end of the file that are counted: each may take a page, of 20 KiB


@dataclass
class Census:
    """The counts, and the refcount structure of the image as far as it makes sense."""

    file: File
    header: Header
    file_size: int
    tally: Tally
    report: Report
    plausible_clusters: int  # where a file ended at most that was cut off
    true_size: int  # of the file; *file_size* is at least where the active L1 table ends
    blocks: "array[int]" = field(default_factory=lambda: array("Q"))  # host offset of each sound refcount block, else 0
    old_structure: "array[int]" = field(
        default_factory=lambda: array("Q")
    )  # the clusters counted for the refcount table and for each block, sound or not
    table_index: dict[int, int] = field(
        default_factory=dict
    )  # of the last L1 entry that names it, by an L2 table's cluster
    snapshots: tuple[Snapshot, ...] = ()  # that the table could be read of
    counted_snapshots: int | None = None  # where the header's number is none
    must_complete_snapshots: bool = False  # one of them lacks what version 3 asks for
    lacks_snapshots: bool = False  # their table, of which the header tells, cannot be read
    askew: set[int] = field(default_factory=set)  # clusters of L2 tables that name places which nothing needs askew
    must_rebuild: bool = False  # the refcounts cannot be put right where they are
    is_cut_off: bool = False  # the image refers to clusters that the file had
    has_short_table: bool = False  # one that begins in the file and ends past it: what it lacks reads as zeros

    @property
    def record(self) -> HeaderRecord:
        """The fields of the header."""
        return self.header.record

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return self.header.cluster_size

    @property
    def file_clusters(self) -> int:
        """How many clusters begin inside the file."""
        return -(-self.file_size >> self.record.cluster_bits)

    @property
    def per_block(self) -> int:
        """How many clusters one refcount block counts."""
        return self.cluster_size * 8 >> self.record.refcount_order

    @property
    def may_miss_shared(self) -> bool:
        """Whether what was not found may refer to clusters that something else refers to, too: snapshots do."""
        return self.report.check_errors > 0 or (self.report.is_dark and self.record.nb_snapshots > 0)

    def cluster_of(self, host_offset: int) -> int:
        """Number of the cluster that holds *host_offset*."""
        return host_offset >> self.record.cluster_bits

    def add(self, what: str, host_offset: int, nbytes: int, role: Role, weight: int = 1) -> bool:
        """Count the clusters of *what*; false, after a finding, if it cannot lie there."""
        if not nbytes:
            return True
        if host_offset % self.cluster_size:
            self.report.loss(f"{what} at {host_offset:#x} is not aligned to a cluster")
            return False
        first, last = self.cluster_of(host_offset), self.cluster_of(host_offset + nbytes - 1)
        if last >= self.file_clusters:
            self.report.loss(f"{what} at {host_offset:#x} ends past the end of the file at {self.file_size:#x}")
            self.miss(last)
        if last >= self.tally.nclusters:
            return False
        self.tally.add(first, last - first + 1, role, weight)
        return True

    def miss(self, cluster: int) -> None:
        """Something refers to *cluster*, past the end of the file."""
        self.is_cut_off |= cluster < self.plausible_clusters

    def is_counted(self, host_offset: int, nbytes: int) -> bool:
        """Whether anything referenced one of these clusters before."""
        first, last = self.cluster_of(host_offset), self.cluster_of(host_offset + nbytes - 1)
        return self.tally.has_any(first, last - first + 1)

    async def entries(self, host_offset: int, nentries: int) -> AsyncIterator[tuple[int, int]]:
        """Index and value of the entries of a table that are not zero, read one cluster at a time."""
        async for at, data in pieces(self.file, host_offset, nentries * ENTRY_SIZE, self.cluster_size):
            for index, entry in enumerate(words_of(data), at // ENTRY_SIZE):
                if entry:
                    yield index, entry


async def take_census(file: File, header: Header, report: Report, progress: Progress | None = None) -> Census:
    """Count every reference of an image whose header was read without trust in its refcounts.

    Memory: 20 KiB for each 4096 host clusters in use, and one table at a time.
    Raises: UnsupportedImage, CorruptImage if something cannot be found or would take forever.
    """
    file_size, l1_end = await Size(file), header.record.l1_end
    census = _begin(file, header, file_size, report)
    census.has_short_table = l1_end > file_size
    if l1_end - file_size >= census.cluster_size:
        census.is_cut_off = True
        report.loss(f"L1 table ends at {l1_end:#x}, past the end of the file at {file_size:#x}")
    census.add("header", 0, census.cluster_size, Role.SINGLE)
    await _count_luks(census)
    record = header.record
    await _count_l1(census, "L1 table", record.l1_table_offset, record.l1_size, Role.L2 | Role.ACTIVE)
    await _count_snapshots(census)
    tables = array("Q", census.tally.clusters(Role.L2))
    weights = array("I", (census.tally.count(cluster) for cluster in tables))
    await count_bitmaps(census)
    await _count_refcount_structure(census)
    for done, (cluster, weight) in enumerate(zip(tables, weights, strict=True), 1):
        await _count_l2(census, cluster << record.cluster_bits, weight)
        if progress is not None:
            progress(done, len(tables))
    _judge_refcount_structure(census)
    return census


def _begin(file: File, header: Header, true_size: int, report: Report) -> Census:
    """An empty census; it has room for references past the end of the file, as a power loss may leave them."""
    record = header.record
    file_size = max(true_size, record.l1_end)
    clusters = -(-file_size >> record.cluster_bits)
    if clusters > MAX_CLUSTERS:
        raise UnsupportedImage(file.path, f"the file is {clusters} clusters long, limit for a check {MAX_CLUSTERS}")
    report.total_clusters = -(-record.size >> record.cluster_bits)
    plausible = clusters + report.total_clusters
    plausible = min(plausible + plausible // 32, MAX_CLUSTERS) + MIN_SLACK
    tally = Tally(
        min(plausible, clusters + MAX_PAST_END),
        Entries(
            record.cluster_bits,
            record.version,
            has_subclusters=record.has_subclusters,
            is_identity=record.has_data_file,
        ),
        true_size,
    )
    return Census(file, header, file_size, tally, report, plausible, true_size)


async def _count_luks(census: Census) -> None:
    """The LUKS header, and whether it opens: without it the disk is noise, so nothing is freed that may be of it."""
    host_offset, nbytes = census.header.luks_area
    if not nbytes:
        return
    from qcow2.format.luks import LuksRecord, luks_problem

    census.add("LUKS header", host_offset, nbytes, Role.SINGLE)
    data = await Read(census.file, host_offset, min(LuksRecord.NBYTES, nbytes))
    if problem := luks_problem(census.file.path, data, nbytes, host_offset):
        census.report.loss(f"nobody can open the LUKS header at {host_offset:#x}: {problem}")


async def _count_l1(census: Census, what: str, host_offset: int, nentries: int, role: Role, weight: int = 1) -> None:
    """Count an L1 table and the L2 tables it points at; what these hold is counted later, once for each table."""
    report = census.report
    if not census.add(what, host_offset, nentries * ENTRY_SIZE, Role.SINGLE, weight):
        return
    async for index, entry in census.entries(host_offset, nentries):
        if l1_has_reserved_bits(entry):
            report.corruption(f"{what} entry {index} has reserved bits set: {entry:#018x}")
        if table_offset := l1_table(entry):
            if Role.ACTIVE in role and census.tally.has(census.cluster_of(table_offset), Role.ACTIVE):
                report.corruption(f"{what} entry {index} shares its L2 table at {table_offset:#x} with an earlier one")
            census.table_index[census.cluster_of(table_offset)] = index
            census.add(f"L2 table of {what} entry {index}", table_offset, census.cluster_size, role, weight)


async def _count_snapshots(census: Census) -> None:
    """Count the snapshot table and each snapshot's L1; one L1 table that several snapshots name is walked once."""
    record = census.record
    if not record.nb_snapshots and record.snapshots_offset % census.cluster_size:  # QEMU does not open it
        census.report.corruption(f"snapshots_offset {record.snapshots_offset:#x} is not aligned to a cluster")
    try:
        table = await read_snapshots(census.file, await _header_with_snapshots(census))
    except ImageError as problem:
        census.report.error(f"the snapshot table cannot be read: {problem}")
        census.lacks_snapshots = True
        return
    census.snapshots = table.snapshots
    census.add("snapshot table", record.snapshots_offset, table.nbytes, Role.SINGLE)
    shared: dict[tuple[int, int], int] = {}
    for snapshot in table.snapshots:
        if record.version >= 3 and not snapshot.is_complete:
            what = f"snapshot {snapshot.id!r} ({snapshot.name!r}) has {len(snapshot.extra)} bytes of extra data"
            census.report.corruption(f"{what}, version 3 asks for {SIZES_BYTES}")
            census.must_complete_snapshots = True
        if snapshot.disk_size and not snapshot.record.l1_size:
            census.report.loss(f"snapshot {snapshot.id!r} ({snapshot.name!r}) has no L1 table")
        elif is_cut_short(snapshot, record):
            what = f"L1 table of snapshot {snapshot.id!r} ({snapshot.name!r}) has {snapshot.record.l1_size} entries"
            census.report.loss(f"{what}, too few for {snapshot.disk_size} bytes")
        key = snapshot.record.l1_table_offset, snapshot.record.l1_size
        shared[key] = shared.get(key, 0) + 1
    for (host_offset, nentries), weight in shared.items():
        if not _is_countable_l1(census, host_offset, nentries * ENTRY_SIZE):
            census.report.loss(f"snapshot L1 table of {nentries} entries at {host_offset:#x} cannot lie there")
        else:
            await _count_l1(census, f"snapshot L1 table at {host_offset:#x}", host_offset, nentries, Role.L2, weight)


async def _header_with_snapshots(census: Census) -> Header:
    """The header, with as many snapshots as its table has if it says more than there can be."""
    record, limit = census.record, layout.MAX_SNAPSHOTS
    if record.nb_snapshots <= limit:
        return census.header
    count, ends = await count_snapshots(census.file, census.header, limit)
    if not ends:
        return census.header
    census.report.corruption(f"nb_snapshots {record.nb_snapshots}, limit {limit}: the snapshot table has {count}")
    census.counted_snapshots = count
    return replace(census.header, record=replace(record, nb_snapshots=count))


def _is_countable_l1(census: Census, host_offset: int, nbytes: int) -> bool:
    """Bounds the work: tables that overlap could make a small file take forever."""
    is_inside = host_offset % census.cluster_size == 0 and host_offset + nbytes <= census.file_size
    return is_inside and nbytes <= layout.MAX_L1_BYTES and not (nbytes and census.is_counted(host_offset, nbytes))


async def _count_refcount_structure(census: Census) -> None:
    """Count the refcount table and its blocks, as far as they are inside the file: they are no loss."""
    record = census.record
    offset, nbytes = record.refcount_table_offset, record.refcount_table_nbytes
    if not nbytes or not offset:
        census.report.corruption("there is no refcount table")
        census.must_rebuild = True
        return
    if not _count_structure(census, "refcount table", offset, nbytes):
        return
    if offset + nbytes > census.file_size > offset + nbytes - census.cluster_size:
        census.report.corruption(f"refcount table at {offset:#x} is cut off by the end of the file")
        census.must_rebuild = True
    census.blocks = array("Q", bytes(nbytes))
    async for index, entry in census.entries(offset, nbytes // ENTRY_SIZE):
        census.blocks[index] = _count_block(census, index, entry)


def _count_structure(census: Census, what: str, host_offset: int, nbytes: int) -> bool:
    """Count a part of the refcount structure; false, after a finding, if it cannot lie there and must be rebuilt."""
    problem = None
    if host_offset % census.cluster_size:
        problem = "is not aligned to a cluster"
    elif host_offset + nbytes - census.cluster_size >= census.file_size:
        problem = f"ends past the end of the file at {census.file_size:#x}"
    if problem is not None:
        census.report.corruption(f"{what} at {host_offset:#x} {problem}")
        census.must_rebuild = True
        return False
    first, n = census.cluster_of(host_offset), nbytes >> census.record.cluster_bits
    census.tally.add(first, n, Role.SINGLE)
    census.old_structure.extend(range(first, first + n))
    return True


def _count_block(census: Census, index: int, entry: int) -> int:
    """Count a refcount block; returns its offset, 0 if there cannot be one."""
    if entry & layout.REFCOUNT_TABLE_RESERVED:
        census.report.corruption(f"refcount table entry {index} has reserved bits set: {entry:#018x}")
        census.must_rebuild = True
    offset = entry & layout.REFCOUNT_TABLE_OFFSET_MASK
    if not offset:
        census.must_rebuild = True
        return 0
    is_there = _count_structure(census, f"refcount block {index}", offset, census.cluster_size)
    return offset if is_there else 0


async def _count_l2(census: Census, table_offset: int, weight: int) -> None:
    table = await Read(census.file, table_offset, census.cluster_size)
    census.has_short_table |= table_offset + census.cluster_size > census.true_size
    if census.record.has_data_file:
        _judge_identity(census, table_offset, table)
        return
    found = census.tally.add_l2(table, weight)
    if census.tally.has(census.cluster_of(table_offset), Role.ACTIVE):
        census.report.allocated_clusters += found.allocated
        census.report.fragmented_clusters += found.fragmented
        census.report.compressed_clusters += found.compressed
    for index in found.suspects:
        where = f"L2 entry {index} at {table_offset + index * census.record.entry_size:#x}"
        entry = census.tally.entries.at(table, index)
        if is_needlessly_askew(census, entry):
            census.askew.add(census.cluster_of(table_offset))
        _judge_l2_entry(census, where, entry)


def _judge_identity(census: Census, table_offset: int, table: bytes) -> None:
    """Say which entries of a table lead elsewhere in the data file than to their own place: they count nothing here."""
    report, entries = census.report, census.tally.entries
    for index, entry, _ in misplaced(census, table_offset, table):
        where = f"L2 entry {index} at {table_offset + index * census.record.entry_size:#x}"
        report.corruption(f"{where} is {entries.text(entry)}, which is not its own place in the data file")
    report.allocated_clusters += sum(map(entries.is_copied, entries.unpack(table)))


def misplaced(census: Census, table_offset: int, table: bytes) -> Iterator[tuple[int, int, int]]:
    """The entries of a table of an image with a data file that make no sense: index, entry, what would be its own."""
    entries = census.tally.entries
    per_table = census.cluster_size // census.record.entry_size
    first = census.table_index[census.cluster_of(table_offset)] * per_table
    whole = entries.data(first << census.record.cluster_bits, per_table)
    for index, (entry, own) in enumerate(zip(entries.unpack(table), whole, strict=True)):
        is_sound = not entry or entry == own or (entries.is_own(entry, own) and not any(entries.contradictions(entry)))
        if not is_sound:
            yield index, entry, own


def is_needlessly_askew(census: Census, entry: int) -> bool:
    """Whether an L2 entry names a host cluster where none can be, and shows the same without it: nothing is lost."""
    entries = census.tally.entries
    return bool(entries.host_offset(entry) % census.cluster_size) and entries.shows_no_data(entry)


def _judge_l2_entry(census: Census, where: str, entry: int) -> None:
    """Say what is wrong with an entry that looked suspicious."""
    report, entries = census.report, census.tally.entries
    for contradiction in entries.contradictions(entry):
        colon = ":" if entries.is_compressed(entry) else ""
        report.corruption(f"{where}{colon} {contradiction}")
    if entries.is_compressed(entry):
        offset, nbytes = entries.payload(entry)
        if (offset + nbytes - 1) // SECTOR_SIZE * SECTOR_SIZE >= census.true_size:  # the stream ends in that sector
            report.loss(f"{where}: compressed data at {offset:#x} ends past the end of the file")
            census.miss(census.cluster_of(offset + nbytes - 1))
        return
    offset = entries.host_offset(entry)
    if offset % census.cluster_size:
        find = report.corruption if is_needlessly_askew(census, entry) else report.loss
        find(f"{where}: data cluster at {offset:#x} is not aligned")
    elif offset and census.cluster_of(offset) >= census.file_clusters:
        report.loss(f"{where}: data cluster at {offset:#x} lies past the end of the file at {census.file_size:#x}")
        census.miss(census.cluster_of(offset))


def _judge_refcount_structure(census: Census) -> None:
    """Once everything is counted: a block is sound if nothing else is where it is."""
    for index, offset in enumerate(census.blocks):
        count = census.tally.count(census.cluster_of(offset)) if offset else 1
        if count != 1:
            census.report.corruption(f"refcount block {index} at {offset:#x} has {count} references")
            census.must_rebuild = True
            census.blocks[index] = 0
    first = census.cluster_of(census.record.refcount_table_offset)
    clusters = range(first, min(first + census.record.refcount_table_clusters, census.tally.nclusters))
    if any(census.tally.count(cluster) != 1 for cluster in clusters):
        census.must_rebuild = True
