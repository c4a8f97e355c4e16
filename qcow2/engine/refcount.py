"""Refcounts: how many references each host cluster has, in blocks held in a bounded cache.

Accurate: a change is written when it is made. Lazy: it stays in memory until the block is evicted or the image closed.
All changes are made under `mutex`, so blocks are written one at a time and in order.
"""

import errno
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

from qcow2.driver.buffer import zeroed
from qcow2.driver.operation import File, Read
from qcow2.engine.rangelock import Mutex
from qcow2.engine.stability import Stability
from qcow2.error import CorruptImage, no_memory
from qcow2.format.geometry import Geometry
from qcow2.format.layout import (
    ENTRY_SIZE,
    MAX_REFCOUNT_TABLE_BYTES,
    SECTOR_SIZE,
)
from qcow2.native import ffi, lib
from qcow2.plane.entry import bytes_of
from qcow2.plane.tally import Tally

CACHE_BYTES = 4 << 20


class Block:
    """One refcount block in memory, as it is in the file or about to be."""

    __slots__ = ("changed", "data", "view")

    def __init__(self, data: bytes | memoryview) -> None:
        """Raises: NotTried if there is no memory for it."""
        try:
            self.data = bytearray(data)
        except MemoryError:
            raise no_memory() from None
        self.view = ffi.from_buffer("uint8_t[]", self.data)
        self.changed = range(0)  # bytes, whole sectors, outside of which it is as it is in the file

    def mark(self, sectors: slice) -> None:
        """The bytes of *sectors* may differ from the file now."""
        changed = self.changed or range(sectors.start, sectors.stop)
        self.changed = range(min(changed.start, sectors.start), max(changed.stop, sectors.stop))


class Refcounts:
    """The refcount table, already validated, and its blocks. Only `mutex` keeps a block in memory across an await."""

    def __init__(
        self,
        file: File,
        geometry: Geometry,
        table: "array[int]",
        table_offset: int,
        stability: Stability,
        *,
        is_lazy: bool,
    ) -> None:
        self.table = table
        self.table_offset = table_offset
        self.mutex = Mutex()
        self.are_too_high = False  # some counts, by a change that failed: the next repair finds the leaks
        self.max_value = (1 << (1 << geometry.refcount_order)) - 1
        self._file = file
        self._geometry = geometry
        self._order = geometry.refcount_order
        self._stability = stability
        self._is_lazy = is_lazy
        self._blocks: OrderedDict[int, Block] = OrderedDict()
        self._max_blocks = max(4, CACHE_BYTES // geometry.cluster_size)

    @property
    def table_end(self) -> int:
        """Host offset past the table."""
        return self.table_offset + len(self.table) * ENTRY_SIZE

    @property
    def per_block(self) -> int:
        """How many host clusters one block counts."""
        return 1 << self._geometry.block_bits

    def block_of(self, cluster: int) -> int:
        """Index of the block that counts *cluster*."""
        return cluster >> self._geometry.block_bits

    def has_block(self, index: int) -> bool:
        """Whether the table leads to a block there; without one its clusters count zero."""
        return index < len(self.table) and self.table[index] != 0

    def block_offset(self, index: int) -> int:
        """Host offset of a block that exists."""
        return self.table[index]

    async def _block(self, index: int) -> Block:
        """The block, which exists; the caller holds `mutex`."""
        block = self._blocks.get(index)
        if block is not None:
            self._blocks.move_to_end(index)
            return block
        await self._make_room()
        block = Block(await Read(self._file, self.block_offset(index), self._geometry.cluster_size))
        self._blocks[index] = block
        return block

    async def _make_room(self) -> None:
        """Forget the block that was not used for the longest time, if another one would be too many."""
        if len(self._blocks) >= self._max_blocks:
            index = next(iter(self._blocks))
            await self._write_block(index)
            del self._blocks[index]

    async def _write_block(self, index: int) -> None:
        block = self._blocks[index]
        if changed := block.changed:  # no more than that: the rest may be a hole, which takes space when it is written
            content = bytes(block.data[changed.start : changed.stop])
            await self._stability.write(self.block_offset(index) + changed.start, content)
            block.changed = range(0)

    async def content(self, index: int) -> bytes | None:
        """The counts of block *index*, None where all are zero; the caller holds `mutex`."""
        return bytes((await self._block(index)).data) if self.has_block(index) else None

    async def find_free(self, first: int, end: int) -> range:
        """The first run of clusters in [first, end) that count zero, as far as one block tells; empty if it has none.

        The caller holds `mutex`.
        """
        index, start = divmod(first, self.per_block)
        stop = min(end - index * self.per_block, self.per_block)
        if self.has_block(index):
            view = (await self._block(index)).view
            start = lib.refcount_find(view, self._order, start, stop, 0)
            stop = lib.refcount_find(view, self._order, start, stop, 1)
        return range(index * self.per_block + start, index * self.per_block + stop)

    async def find_end(self, end: int) -> int:
        """One past the last cluster below *end* that is referenced; the caller holds `mutex`."""
        for index in reversed(range(min(len(self.table), self.block_of(end - 1) + 1))):  # a hole may be of any length
            if self.has_block(index):
                base = index * self.per_block
                limit = min(end - base, self.per_block)
                used = lib.refcount_used((await self._block(index)).view, self._order, limit)
                if used:
                    return base + used
        return 0

    async def last_references(self, clusters: Iterable[int]) -> list[int]:
        """The *clusters*, ascending, that are named as often as they are referenced; the caller holds `mutex`."""
        return [cluster async for cluster in self._picked(clusters, lib.refcount_last)]

    async def uncounted(self, clusters: Iterable[int], end: int) -> list[int]:
        """Those of the *clusters* below *end*, ascending, that count zero; the caller holds `mutex`."""
        below = [cluster for cluster in clusters if cluster < end]
        without = [cluster for cluster in below if not self.has_block(self.block_of(cluster))]
        return without + [cluster async for cluster in self._picked(below, lib.refcount_zero)]

    async def _picked(self, clusters: Iterable[int], pick: Callable[..., int]) -> AsyncIterator[int]:
        """The *clusters* that *pick*, a function of refcount.c, takes from their blocks."""
        for index, entries in self._by_block(clusters):
            if self.has_block(index):
                block = await self._block(index)
                view, found = ffi.from_buffer("uint64_t[]", entries), ffi.new("uint64_t[]", len(entries))
                n = pick(block.view, self._order, view, len(entries), found)
                for entry in ffi.unpack(found, n):
                    yield index * self.per_block + entry

    async def add(self, clusters: Iterable[int], delta: int) -> None:
        """Change the counts of *clusters* by *delta*, 1 or -1, for each time they are named.

        Accurate: written on return, not yet stable. The caller holds `mutex`.
        Raises: OSError; then nothing has changed in memory, though an increment may have in the file. OverflowError
        for a count that no block can hold, or that has no block.
        """
        for index, entries in self._by_block(clusters):
            await self._add_to_block(index, entries, delta)

    async def require_room(self, tally: Tally) -> None:
        """Return if every count can grow by what *tally* counts; the caller holds `mutex`.

        Raises: OSError(EINVAL) naming the limit; CorruptImage if something is not counted at all.
        """
        for index in self._indexes(tally):
            first = index * self.per_block
            if not self.has_block(index):
                where = first << self._geometry.cluster_bits
                raise CorruptImage(self._file.path, where, f"no refcount block counts what lies from {where:#x} on")
            block = await self._block(index)
            if (cluster := tally.misfit(block.view, self._order, first, self.per_block)) is not None:
                if lib.refcount_get(block.view, self._order, cluster - first) == 0:
                    where = cluster << self._geometry.cluster_bits
                    message = f"cluster {cluster} is in use, but its refcount is 0: check -r all puts it right"
                    raise CorruptImage(self._file.path, where, message)
                message = f"cluster {cluster} is referenced too often for refcounts of {1 << self._order} bits"
                raise OSError(errno.EINVAL, message, self._file.path)

    async def raise_by(self, tally: Tally) -> None:
        """Add what *tally* counts, for which there is room; written on return, unless lazy. The caller holds `mutex`.

        Raises: OSError; then nothing has changed in memory, though counts may have risen in the file; `are_too_high`
        if that could not be.
        """
        raised: list[int] = []
        try:
            for index in self._indexes(tally):
                await self._change_block(tally, index, 1)
                raised.append(index)
                if not self._is_lazy:
                    await self._write_block(index)
        except (OSError, MemoryError):
            await self._lower(tally, raised)
            raise

    async def take_back(self, tally: Tally) -> None:
        """Let counts be as before `raise_by`, in memory until `write_all`. Raises: OSError; `are_too_high` then."""
        await self._lower(tally, self._indexes(tally))

    async def _lower(self, tally: Tally, indexes: Iterable[int]) -> None:
        self.are_too_high = True
        for index in indexes:
            await self._change_block(tally, index, -1)
        self.are_too_high = False

    async def _change_block(self, tally: Tally, index: int, sign: int) -> None:
        """Add what *tally* counts in one block, or take it back."""
        block, first = await self._block(index), index * self.per_block
        entries = tally.next(first) or 0, tally.end(first + self.per_block) - 1
        tally.change_counts(block.view, self._order, first, self.per_block, sign)
        block.mark(self._sectors(*(entry - first for entry in entries)))

    def _indexes(self, tally: Tally) -> Iterator[int]:
        """The blocks in which *tally* counts something."""
        cluster = tally.next(0)
        while cluster is not None:
            index = self.block_of(cluster)
            yield index
            cluster = tally.next((index + 1) * self.per_block)

    def _by_block(self, clusters: Iterable[int]) -> Iterator[tuple[int, "array[int]"]]:
        """Blocks in ascending order, each with its entries for *clusters*, ascending and as often as they are named."""
        numbers = sorted(clusters)
        start = 0
        while start < len(numbers):
            index = self.block_of(numbers[start])
            base = index * self.per_block
            stop = bisect_left(numbers, base + self.per_block, start)
            yield index, array("Q", [number - base for number in numbers[start:stop]])
            start = stop

    async def _add_to_block(self, index: int, entries: "array[int]", delta: int) -> None:
        """Change one block; *entries* are ascending."""
        if not self.has_block(index):
            cluster = index * self.per_block + entries[0]
            raise OverflowError(f"no refcount block counts cluster {cluster}, which is referenced")
        block = await self._block(index)
        sectors = self._sectors(entries[0], entries[-1])
        old = bytes(block.data[sectors])
        view = ffi.from_buffer("uint64_t[]", entries)
        done = lib.refcount_add(block.view, self._order, view, len(entries), delta)
        if done < len(entries):
            value = lib.refcount_get(block.view, self._order, entries[done]) + delta
            block.data[sectors] = old
            cluster = index * self.per_block + entries[done]
            raise OverflowError(f"refcount {value} of cluster {cluster}, limit {self.max_value}")
        if self._is_lazy:
            block.mark(sectors)
        else:
            await self._write_sectors(index, block, sectors, old)

    def _sectors(self, first: int, last: int) -> slice:
        """The bytes of a block, whole sectors, that have its entries from *first* to *last*."""
        start, stop = ((entry << self._order) // 8 // SECTOR_SIZE * SECTOR_SIZE for entry in (first, last))
        return slice(start, stop + SECTOR_SIZE)

    async def _write_sectors(self, index: int, block: Block, sectors: slice, old: bytes) -> None:
        """Write changed *sectors* of *block*, or make them *old* again."""
        try:
            await self._stability.write(self.block_offset(index) + sectors.start, bytes(block.data[sectors]))
        except OSError:
            block.data[sectors] = old
            block.mark(sectors)  # a part of it may have reached the file
            raise

    async def create_block(self, index: int, cluster: int) -> None:
        """Let *cluster*, one that the block counts itself, hold block *index*; the caller holds `mutex`.

        Stable before the table can point at it (law 6); the table entry is written, not yet stable.
        """
        block = Block(zeroed(self._geometry.cluster_size))
        lib.refcount_set(block.view, self._order, cluster % self.per_block, 1)
        host_offset = cluster << self._geometry.cluster_bits
        await self._make_room()  # which may fail: not once the table points at the block, which is nobody's then
        await self._stability.write(host_offset, block.data)
        await self._stability.sync()
        await self._stability.write(self.table_offset + index * ENTRY_SIZE, bytes_of([host_offset]))
        self.table[index] = host_offset
        self._blocks[index] = block

    async def link_block(self, index: int, cluster: int) -> None:
        """Let *cluster*, stable zeros that another block counts, hold block *index*; the caller holds `mutex`.

        The table entry is written, not yet stable: without it the same clusters count zero.
        """
        host_offset = cluster << self._geometry.cluster_bits
        await self._stability.write(self.table_offset + index * ENTRY_SIZE, bytes_of([host_offset]))
        self.table[index] = host_offset

    async def counts_itself_alone(self, index: int) -> bool:
        """Whether block *index*, which exists, counts nothing, or nothing but its own cluster, once.

        The caller holds `mutex`.
        """
        block, n = await self._block(index), self.per_block
        first = lib.refcount_find(block.view, self._order, 0, n, 1)
        if first == n:
            return True
        is_its_own = index * n + first == self.block_offset(index) >> self._geometry.cluster_bits
        is_alone = lib.refcount_used(block.view, self._order, n) == first + 1
        return is_its_own and is_alone and lib.refcount_get(block.view, self._order, first) == 1

    async def unlink_block(self, index: int) -> None:
        """Let no block count what block *index* counted: nothing but itself. The caller holds `mutex`.

        The table entry is written, not yet stable.
        """
        await self._stability.write(self.table_offset + index * ENTRY_SIZE, bytes_of([0]))
        self.table[index] = 0
        del self._blocks[index]

    def plan_table(self, needed_index: int, start: int, enough: int) -> "TablePlan":
        """A larger table that has entry *needed_index*, at clusters from *start* on, which no block counts yet.

        More than *enough* entries it has only if it must. Raises: OSError(EFBIG) beyond the limit of the format's
        writers.
        """
        grown = min(len(self.table) * 3 // 2, MAX_REFCOUNT_TABLE_BYTES // ENTRY_SIZE)
        nentries = min(grown, enough) if needed_index < enough else grown
        return TablePlan(self._geometry, self.table, max(needed_index + 1, nentries), start)

    def adopt(self, plan: "TablePlan") -> None:
        """The header points at the planned table now."""
        self.table = plan.table
        self.table_offset = plan.start << self._geometry.cluster_bits

    async def write_all(self) -> None:
        """Write every changed block; process-safe on return. The caller holds `mutex`."""
        for index in self._blocks:
            await self._write_block(index)


class TablePlan:
    """A new refcount table in clusters past all counted ones, followed by the blocks that count this area itself."""

    def __init__(self, geometry: Geometry, old: "array[int]", nentries: int, start: int) -> None:
        self.start = start
        self._geometry = geometry
        per_cluster = geometry.cluster_size // ENTRY_SIZE
        first_block = start >> geometry.block_bits
        self.table_clusters, nblocks = 1, 1
        while (end_block := self._end_block(nblocks)) > first_block + nblocks or (
            max(nentries, end_block) > self.table_clusters * per_cluster
        ):
            nblocks = end_block - first_block
            self.table_clusters = -(-max(nentries, end_block) // per_cluster)
        if self.table_clusters << geometry.cluster_bits > MAX_REFCOUNT_TABLE_BYTES:
            raise OSError(errno.EFBIG, f"the refcount table would exceed {MAX_REFCOUNT_TABLE_BYTES} bytes")
        self.clusters = range(start, start + self.table_clusters + nblocks)
        self.block_clusters = self.clusters[self.table_clusters :]
        self.table = old + array("Q", bytes((self.table_clusters * per_cluster - len(old)) * ENTRY_SIZE))
        for ahead, cluster in enumerate(self.block_clusters):
            self.table[first_block + ahead] = cluster << geometry.cluster_bits

    def _end_block(self, nblocks: int) -> int:
        """One past the index of the block that counts the last cluster of the area."""
        return (self.start + self.table_clusters + nblocks - 1 >> self._geometry.block_bits) + 1

    def content(self) -> Iterator[tuple[int, bytes]]:
        """What goes to the file: the table, then its blocks, each with its first cluster."""
        yield self.start, bytes_of(self.table)
        per_block = 1 << self._geometry.block_bits
        for ahead, where in enumerate(self.block_clusters):
            block = Block(zeroed(self._geometry.cluster_size))
            base = (self.start // per_block + ahead) * per_block
            for cluster in range(max(base, self.start), min(base + per_block, self.clusters.stop)):
                lib.refcount_set(block.view, self._geometry.refcount_order, cluster - base, 1)
            yield where, bytes(block.data)
