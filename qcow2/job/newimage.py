"""A new image, written in one pass: data in the order it comes, then the tables, and the header when all is stable.

Until then there is no magic in the file: it is no image. No cluster is shared: each refcount is 1, and none need be
kept; 0 are those of the few clusters that were taken and not needed, and that nobody took after. Memory is bounded: an
L2 table goes to the file when the copy has passed it.
"""

from array import array

from qcow2.driver.operation import CopyRange, File, Resize, Sync, Together, Write, Zero
from qcow2.engine.create import Options, new_header, plan, refcount_clusters, refcounts_of_one, table_of
from qcow2.engine.image import Image
from qcow2.engine.opened import OpenOptions
from qcow2.engine.plain import Preallocation
from qcow2.format.header import Header
from qcow2.format.layout import ENTRY_SIZE, SECTOR_SIZE
from qcow2.job.source import Piece
from qcow2.job.target import MAGIC, LastStep, Plain, Runs, Spots, without_magic
from qcow2.native import ffi, lib
from qcow2.node.node import Node
from qcow2.plane.entry import bytes_of, l1_entry

Place = list[tuple[int, int, int]]  # (first cluster of the range, after its last, first host cluster)


class NewImage:
    """A `Target` that becomes an image with *options* in *file*, over *backing* if they name one."""

    def __init__(self, file: File, options: Options, backing: Node | None = None, *, reads_zeros: bool = True) -> None:
        """*reads_zeros*: what is not written in *file* reads as zeros, as in every file that was emptied."""
        self.unit = options.cluster_size
        self._file = file
        self._options = options
        self._backing_size = backing.size if backing is not None else 0
        self._reads_zeros = reads_zeros
        self.plain: Plain | None = None if self._writes_all else self
        self.last_step: LastStep | None = None
        self._whole = plan(options)
        self._l1 = array("Q", bytes(self._whole.l1_size * ENTRY_SIZE))
        self._tables: dict[int, list[int]] = {}
        self._entries = options.entries
        self._per_table = options.cluster_size // self._entries.nbytes
        self._next = 1 + self._whole.l1_clusters  # host cluster
        self._left_over: list[tuple[int, int]] = []  # host clusters before that: (first, how many)

    @property
    def _maps_all(self) -> bool:
        return self._options.preallocation is not Preallocation.OFF

    @property
    def _writes_all(self) -> bool:
        return not self._reads_zeros or self._options.preallocation is Preallocation.FULL

    async def begin(self) -> None:
        """Nothing that was in the file is an image any more.

        Raises: UnsupportedImage, before the file is touched, if the header does not fit; OSError.
        """
        new_header(self._file, self._options, self._whole.l1_size, self.unit, self.unit, 1)
        await Resize(self._file, 0)
        await Zero(self._file, 0, SECTOR_SIZE)
        await Sync(self._file)
        if self._options.preallocation is Preallocation.FALLOC:
            await Resize(self._file, self._whole.end_offset, reserve=True)

    async def pack(self, data: memoryview, runs: Runs) -> object:
        """As it is."""

    def place(self, offset: int, nbytes: int, runs: Runs, packed: object = None) -> Place:
        """Take clusters for all that holds data, or for all there is, and map them."""
        return [part for low, high in self._ranges(offset, nbytes, runs) for part in self._take(low, high)]

    def _ranges(self, offset: int, nbytes: int, runs: Runs) -> list[tuple[int, int]]:
        """Which clusters of these bytes are to be stored; what a backing file would show in the others is hidden."""
        first, last = offset // self.unit, -(-(offset + nbytes) // self.unit)
        if self._stores_zeros(first):
            return [(first, last)]
        ranges = self._touched(offset, runs)
        self._hide(first, min(last, -(-self._backing_size // self.unit)), ranges)
        return ranges

    def _stores_zeros(self, cluster: int) -> bool:
        """Whether it has a host cluster whatever it holds: version 2 hides what a backing file shows by zeros."""
        return self._maps_all or (self._options.version < 3 and cluster * self.unit < self._backing_size)

    def _touched(self, offset: int, runs: Runs) -> list[tuple[int, int]]:
        """The clusters that hold data, as (first, after the last)."""
        ranges: list[tuple[int, int]] = []
        for start, end in runs:
            low, high = (offset + start) // self.unit, -(-(offset + end) // self.unit)
            if ranges and low <= ranges[-1][1]:
                ranges[-1] = ranges[-1][0], high
            else:
                ranges.append((low, high))
        return ranges

    def _take(self, low: int, high: int) -> Place:
        """Host clusters for guest clusters."""
        place = []
        while low < high:
            host, count = self._take_run(high - low)
            for cluster, entry in enumerate(self._entries.data(host << self._options.cluster_bits, count), low):
                self._set(cluster, entry)
            place.append((low, low + count, host))
            low += count
        return place

    def _take_run(self, most: int) -> tuple[int, int]:
        """Host clusters that follow one another: the first, and how many. Those that are left over come first."""
        if not self._left_over:
            self._next += most
            return self._next - most, most
        host, count = self._left_over.pop()
        if count > most:
            self._left_over.append((host + most, count - most))
        return host, min(most, count)

    def settle(self, offset: int, runs: Runs, place: object) -> None:
        """What holds no data gives its clusters back: nobody has written to them."""
        assert isinstance(place, list)
        if self._stores_zeros(offset // self.unit):
            return
        holding = {cluster for low, high in self._touched(offset, runs) for cluster in range(low, high)}
        for low, high, host in place:
            for cluster in range(low, high):
                if cluster not in holding:
                    self._give_back(cluster, host + cluster - low)

    def _give_back(self, cluster: int, host: int) -> None:
        self._set(cluster, self._entries.zeros if cluster * self.unit < self._backing_size else 0)
        before, count = self._left_over.pop() if self._left_over else (host, 0)
        if before + count == host:
            self._left_over.append((before, count + 1))
        else:
            self._left_over += [(before, count), (host, 1)]

    def _set(self, cluster: int, entry: int) -> None:
        index, inside = divmod(cluster, self._per_table)
        table = self._tables.get(index)
        if table is None:
            table = self._tables[index] = [0] * self._per_table
        table[inside] = entry

    def _hide(self, first: int, last: int, taken: list[tuple[int, int]]) -> None:
        """Say zeros where the backing file would show."""
        for low, high in [*taken, (last, last)]:
            for cluster in range(first, min(low, last)):
                self._set(cluster, self._entries.zeros)
            first = max(first, high)

    async def put(self, offset: int, data: memoryview, runs: Runs, place: object) -> None:
        """Write what is not zeros; whole clusters where the file may hold anything."""
        writes = (
            self._whole_clusters(offset, data, place) if self._writes_all else self._writes(offset, data, runs, place)
        )
        if writes:
            await Together(writes)

    def _whole_clusters(self, offset: int, data: memoryview, place: object) -> list[Write]:
        assert isinstance(place, list)
        writes: list[Write] = []
        for low, high, host in place:
            start, end = low * self.unit - offset, high * self.unit - offset
            writes.append(self._writing(host, 0, data[start:end], bytes(max(0, end - len(data)))))
        return writes

    def _writes(self, offset: int, data: memoryview, runs: Runs, place: object) -> list[Write]:
        return [
            Write(at.file, at.host_offset, data[start:end], data=True)
            for start, end, at in self.spots(offset, runs, place)
        ]

    def spots(self, offset: int, runs: Runs, place: object) -> Spots:
        """In the clusters that they have."""
        assert isinstance(place, list)
        spots: Spots = []
        for low, high, host in place:
            first, last = low * self.unit - offset, high * self.unit - offset
            for run_start, run_end in runs:
                start, end = max(run_start, first), min(run_end, last)
                if start < end:
                    spots.append((start, end, Piece(self._file, (host << self._options.cluster_bits) + start - first)))
        return spots

    def straight(self, offset: int) -> None:
        """What it holds decides."""

    async def take(self, offset: int, nbytes: int, place: object, there: Piece) -> bool:
        """To its clusters."""
        assert isinstance(place, list)
        if self._writes_all:
            return False
        for low, high, host in place:
            ahead = low * self.unit - offset
            rest = min(nbytes, high * self.unit - offset) - ahead
            target_offset = host << self._options.cluster_bits
            if not await CopyRange(there.file, there.host_offset + ahead, self._file, target_offset, rest):
                return False
        return True

    def _writing(self, host: int, ahead: int, *pieces: memoryview | bytes) -> Write:
        return Write(self._file, (host << self._options.cluster_bits) + ahead, *pieces, data=True)

    async def _write(self, host: int, ahead: int, *pieces: memoryview | bytes) -> None:
        await self._writing(host, ahead, *pieces)

    async def zero(self, offset: int, nbytes: int) -> None:
        """Leave it out, unless something would show or it shall have its clusters."""
        if not self._maps_all and offset >= self._backing_size:
            return
        span = self._per_table * self.unit
        end = offset + nbytes
        while offset < end:  # a table at a time: they may be many
            stop = min(end, offset - offset % span + span)
            for low, high, host in self.place(offset, stop - offset, []):
                if self._writes_all:
                    for ahead in range(high - low):
                        await self._write(host + ahead, 0, bytes(self.unit))
            if stop - offset == span:
                await self._write_table(offset // span)
            offset = stop

    async def advance(self, offset: int) -> None:
        """Write the tables that are complete."""
        span = self._per_table * self.unit
        for index in [index for index in self._tables if (index + 1) * span <= offset]:
            await self._write_table(index)

    async def _write_table(self, index: int) -> None:
        table = self._tables.pop(index, None)
        if table is None:
            return
        host, _ = self._take_run(1)
        host_offset = host << self._options.cluster_bits
        self._l1[index] = l1_entry(host_offset)
        await Write(self._file, host_offset, self._entries.pack(table))

    async def finish(self) -> None:
        """Tables, refcounts, the header, and once they are stable its magic."""
        for index in sorted(self._tables):
            await self._write_table(index)
        await self._write_whole(1, bytes_of(self._l1))
        self._leave_end()
        ntable, nblocks = refcount_clusters(self._options, self._next)
        table, blocks = self._next, self._next + ntable
        end = blocks + nblocks
        offsets = table_of(blocks << self._options.cluster_bits, nblocks, self.unit)
        await self._write_whole(table, offsets)
        per_block = self.unit * 8 >> self._options.refcount_order
        for index in range(nblocks):
            first = index * per_block
            await self._write_whole(blocks + index, self._refcounts(first, min(per_block, end - first)))
        await Resize(self._file, end << self._options.cluster_bits)
        header, packed = new_header(
            self._file, self._options, self._whole.l1_size, self.unit, table << self._options.cluster_bits, ntable
        )
        await Write(self._file, len(MAGIC), packed[len(MAGIC) :].ljust(self.unit - len(MAGIC), b"\0"))
        await Sync(self._file)
        if self.last_step is not None:
            await self._go_on(header, self.last_step)
        await Write(self._file, 0, MAGIC)
        await Sync(self._file)

    async def _go_on(self, header: Header, step: LastStep) -> None:
        """Take *step* with the image, which nobody else can open yet."""
        options = OpenOptions(writable=True, has_data=False, has_below=False)
        image = await Image.open(self._file, options=options, header=without_magic(header))
        await step(image)
        await image.close()

    def _leave_end(self) -> None:
        """What is left over at the end is no part of the image."""
        self._left_over.sort()
        while self._left_over and sum(self._left_over[-1]) == self._next:
            self._next = self._left_over.pop()[0]

    def _refcounts(self, first: int, count: int) -> bytes:
        """Of host clusters, as in a block that begins with the first."""
        ones = bytearray(refcounts_of_one(count, self._options.refcount_order))
        block = ffi.from_buffer("uint8_t[]", ones)
        for host, left_over in self._left_over:
            for index in range(max(host, first), min(host + left_over, first + count)):
                lib.refcount_set(block, self._options.refcount_order, index - first, 0)
        return bytes(ones)

    async def _write_whole(self, host: int, content: bytes) -> None:
        """Clusters to their end."""
        await self._write(host, 0, content, bytes(-len(content) % self.unit))
