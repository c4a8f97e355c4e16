"""The write path: overwrite in place, or allocate, copy, write, and only then link."""

from collections.abc import Sequence

from qcow2.driver.buffer import MemoryBuffer, zeroed
from qcow2.driver.operation import Buffer
from qcow2.engine.backing import Place, Seen
from qcow2.engine.compressed import Payload
from qcow2.engine.links import Links
from qcow2.engine.opened import Opened
from qcow2.engine.part import Part
from qcow2.engine.partial import PartialWrites, is_partial
from qcow2.engine.rangelock import RangeLocks
from qcow2.engine.rollback import Rollback
from qcow2.engine.root import Root
from qcow2.engine.space import Space
from qcow2.engine.subclusters import Subclusters
from qcow2.engine.table import Tables
from qcow2.engine.turns import Turns
from qcow2.format.layout import SECTOR_SIZE
from qcow2.plane.l2cache import Kind, Run

# Plain ints: these are compared for every request.
MISS, BAD, UNALLOCATED, ZERO_PLAIN, ZERO_ALLOCATED, DATA = (
    int(kind) for kind in (Kind.MISS, Kind.BAD, Kind.UNALLOCATED, Kind.ZERO_PLAIN, Kind.ZERO_ALLOCATED, Kind.DATA)
)
COPY_BYTES = 32 << 20  # of old content in memory, two clusters at most for each copy under way
MAX_PLACED = 4 << 20  # bytes of clusters that are given a place at a time
HOLDS_NOTHING = (UNALLOCATED, ZERO_PLAIN)


class Writer(Part):
    """Writes guest bytes of one image. `locks` are on guest clusters: who changes an entry holds its cluster's."""

    def __init__(self, opened: Opened, root: Root, space: Space, links: Links, tables: Tables) -> None:
        super().__init__(opened, root, space)
        self.locks = RangeLocks(opened.mapping.cache)
        self._partial = PartialWrites(self.locks, opened.geometry.cluster_size)
        self._copies = Turns(max(4, COPY_BYTES // opened.geometry.cluster_size))
        self._tables = tables
        self._links = links
        self.subclusters = Subclusters(opened, root, space, links)

    async def write(self, guest_offset: int, source: Buffer) -> None:
        """Put *source*, which lies inside the disk, at *guest_offset*; process-safe on return.

        Raises: OSError; a data write that failed has changed no metadata.
        """
        nbytes = len(source)
        if self._data.is_encrypted and is_partial(guest_offset, nbytes):
            await self._partial.write(guest_offset, source, self._reader.read, self.write_held, self.write)
            return
        done = 0
        while done < nbytes:
            run = self._mapping.known(guest_offset + done, nbytes - done)
            if run.kind != DATA or not run.copied or self._partial.are_there:
                await self._write_locked(run, guest_offset + done, source.slice(done, nbytes - done))
                return
            # No await between the mapping and the start of the transfer: Grace then covers it (law 5).
            await self._data.write(run.host_offset, source.slice(done, run.nbytes))
            done += run.nbytes

    async def _write_locked(self, run: Run, guest_offset: int, source: Buffer) -> None:
        """Write *source*; *run* is what memory tells about its front."""
        nbytes = len(source)
        first = self._geometry.cluster_of(guest_offset)
        last = self._geometry.cluster_of(guest_offset + nbytes - 1)
        async with self.locks.hold(first, last) as hold:
            done = 0
            if run.kind not in (MISS, BAD) and hold.was_immediate:
                done = await self._write_run(run, guest_offset, source.slice(0, run.nbytes))
            await self.write_held(guest_offset + done, source.slice(done, nbytes - done))

    async def write_held(self, guest_offset: int, source: Buffer) -> None:
        """Write *source* to clusters that are locked."""
        done = 0
        while done < len(source):
            run = await self._mapping.resolve(guest_offset + done, len(source) - done)
            done += await self._write_run(run, guest_offset + done, source.slice(done, run.nbytes))

    async def _write_run(self, run: Run, guest_offset: int, source: Buffer) -> int:
        """Write the front of *source* to the clusters of *run*, which are locked; how many bytes were written."""
        if run.kind == DATA and (run.copied or self._geometry.has_data_file):
            await self._data.write(run.host_offset, source)
            return len(source)
        source = self._front(source, self._geometry.slice_end(guest_offset) - guest_offset)  # links of one write
        if not self._mapping.has_private_table(guest_offset):
            await self._tables.require_private(guest_offset)
        if self._geometry.has_subclusters:
            async with self._copies:
                return await self.subclusters.write(guest_offset, source)
        if self._geometry.has_data_file:
            return await self._write_own_place(run, guest_offset, source)
        if run.kind == ZERO_ALLOCATED and run.copied:
            return await self._write_kept(run, guest_offset, source)
        return await self._write_new(run, guest_offset, source)

    async def preallocate(self, guest_offset: int, nbytes: int, *, writes: bool) -> None:
        """Give the clusters of the range that hold nothing, and show nothing, a place; nobody else acts.

        They are zeros; *writes* writes them, too, where the host may have none. Of an external data file the whole
        range is new, and holds stable zeros.
        """
        end = min(self._geometry.round_up(guest_offset + nbytes), self._geometry.size)
        offset = self._geometry.round_down(guest_offset)
        if writes and self._geometry.has_data_file:
            written = self._geometry.round_up(end) if self._ends_whole else end
            for start in range(guest_offset, written, MAX_PLACED):
                await self._data.write(start, zeroed(min(MAX_PLACED, written - start)))
            await self._stability.sync()
        while offset < end:
            run = await self._mapping.resolve(offset, min(end, self._geometry.slice_end(offset)) - offset)
            if self._geometry.has_subclusters:
                run = run._replace(nbytes=min(end - offset, self._geometry.cluster_size))
            taken = run.nbytes
            if run.kind in HOLDS_NOTHING and await self._reader.reads_as_zeros(offset, run.nbytes):
                if offset < guest_offset and self._geometry.has_data_file:  # its front may be anything there
                    taken = await self._place_own(offset, min(run.nbytes, self._geometry.cluster_size), is_zeros=False)
                else:
                    taken = min(run.nbytes, await self.place(run, offset, writes=writes))
            offset += taken

    async def place(self, run: Run, guest_offset: int, *, writes: bool) -> int:
        """Link new clusters, as many as come in one piece, for the front of *run*; how many bytes."""
        if self._geometry.has_data_file:
            return await self._place_own(guest_offset, run.nbytes, is_zeros=writes or not self._data.is_encrypted)
        await self._tables.require_private(guest_offset)
        if self._geometry.has_subclusters:
            await self.subclusters.place(guest_offset, writes=writes)
            return self._geometry.cluster_size
        bits = self._geometry.cluster_bits
        new = await self._allocator.allocate(min(self._geometry.clusters(run.nbytes), MAX_PLACED >> bits or 1))
        async with Rollback(self._reaper.free, new):
            if writes:
                await self._data.write(new.start << bits, bytes(len(new) << bits))
            await self._root.allow_uncounted()
            self._allocator.allow_links()
            await self._link(run, guest_offset >> bits, len(new), new.start << bits)
        self._statistics.clusters_allocated += len(new)
        return len(new) << bits

    async def _place_own(self, guest_offset: int, nbytes: int, *, is_zeros: bool) -> int:
        """The same in the external data file; what is there shows if it *is_zeros*, else the entries say zeros."""
        await self._tables.require_private(guest_offset)
        entries = self._mapping.entries.data(guest_offset, self._geometry.clusters(nbytes))
        if not is_zeros:
            entries = [self._mapping.entries.blank(entry) for entry in entries]
        self._allocator.allow_links()
        await self._mapping.link(guest_offset, entries)
        self._statistics.clusters_allocated += len(entries)
        return nbytes

    @staticmethod
    def _front(source: Buffer, nbytes: int) -> Buffer:
        return source if len(source) <= nbytes else source.slice(0, nbytes)

    async def _write_kept(self, run: Run, guest_offset: int, source: Buffer) -> int:
        """Write clusters that read as zeros but keep host clusters, in which anything may be.

        Their whole content is stable before the zero flag goes (law 3).
        """
        bits = self._geometry.cluster_bits
        first, last = guest_offset >> bits, (guest_offset + len(source) - 1) >> bits
        head = guest_offset - (first << bits)
        tail = (last + 1 << bits) - guest_offset - len(source)
        host_offset = run.host_offset - head
        await self._data.write(host_offset, zeroed(head), source, zeroed(tail))
        await self._link_over(run, first, last - first + 1, host_offset)
        return len(source)

    async def _write_own_place(self, run: Run, guest_offset: int, source: Buffer) -> int:
        """Write clusters of the external data file, in which anything may be, whole, and link them.

        Their content is stable before that: else the guest would see what was there after a power loss (law 3).
        A raw file shows zeros where no entry leads, and still does while they are linked. It is written in place, by
        others too, once the entries are stable: else a power loss may keep what is written and not the entry.
        """
        bits = self._geometry.cluster_bits
        first, last = guest_offset >> bits, (guest_offset + len(source) - 1) >> bits
        own = range(first, last + 1)
        if self._root.header.record.has_raw_data:
            end = min(last + 1 << bits, self._geometry.size)
            await self._data.zero(first << bits, end - (first << bits))
            old_entries = self._mapping.entries.moved(run.entry, len(own))
            entries = self._mapping.entries.data(first << bits, len(own))
            await self._mapping.link_stable(first << bits, old_entries, entries)
            await self._data.write(guest_offset, source)
        else:
            await self._write_where_it_is(run, guest_offset, source, own)
        self._statistics.clusters_allocated += len(own)
        return len(source)

    async def _write_where_it_is(self, run: Run, guest_offset: int, source: Buffer, own: range) -> None:
        """The same where entries alone tell what is shown. What is untouched is stable zeros: it is linked at once."""
        bits, untouched = self._geometry.cluster_bits, self._mapping.cache.untouched
        assert untouched is not None
        self._allocator.allow_links()
        place = await self._place_of_old(run, own.start << bits, min(own.stop << bits, self._geometry.size))
        is_zeros = place is Seen.ZEROS and run.kind in HOLDS_NOTHING and untouched.has(own)
        untouched.forget(own)
        if is_zeros:
            await self._data.write(guest_offset, source)
            await self._link(run, own.start, len(own), own.start << bits)
            return
        async with self._copies:
            await self._copy(place, guest_offset, source, own)
        await self._link_over(run, own.start, len(own), own.start << bits)

    async def _write_new(self, run: Run, guest_offset: int, source: Buffer) -> int:
        """Write to newly allocated clusters, as many as come in one piece, and link them; the old ones are freed."""
        bits = self._geometry.cluster_bits
        first, last = guest_offset >> bits, (guest_offset + len(source) - 1) >> bits
        place = await self._place_of_old(run, first << bits, min(last + 1 << bits, self._geometry.size))
        covers_something = place is not Seen.ZEROS
        allocate = self._allocator.allocate_unsynced if covers_something else self._allocator.allocate
        new = await allocate(last - first + 1)
        source = self._front(source, (first + len(new) << bits) - guest_offset)
        host_offset = new.start << bits
        async with Rollback(self._reaper.free, new):
            await self._fill(place, guest_offset, source, new)
            await self._root.allow_uncounted()
            self._allocator.allow_links()
            if covers_something:
                await self._link_over(run, first, len(new), host_offset)
            else:
                await self._link(run, first, len(new), host_offset)
        self._statistics.clusters_allocated += len(new)
        return len(source)

    async def _fill(self, place: Place | Seen, guest_offset: int, source: Buffer, new: range) -> None:
        """Write *source*, and what the guest saw in the rest of its first and last cluster, to the clusters *new*.

        If it saw anything but zeros, which they hold already, it must not see zeros after a power loss: everything must
        be stable then before it is linked (law 3).
        """
        if place is Seen.ZEROS:
            host_offset = new.start << self._geometry.cluster_bits
            await self._data.write(host_offset + guest_offset % self._geometry.cluster_size, source)
            return
        async with self._copies:
            await self._copy(place, guest_offset, source, new)

    async def _copy(self, place: Place | Seen, guest_offset: int, source: Buffer, new: range) -> None:
        start = self._geometry.round_down(guest_offset)
        end = min(start + (len(new) << self._geometry.cluster_bits), self._geometry.size)
        host_offset = new.start << self._geometry.cluster_bits
        unit = SECTOR_SIZE if self._root.header.record.has_raw_data else self._geometry.cluster_size
        behind = zeroed(-end % unit if self._data.is_encrypted else 0)  # the disk
        self._statistics.copies += len(new)
        stop = guest_offset + len(source)
        if isinstance(place, tuple) and len(new) == 1 and len(source) < end - start:
            old = zeroed(end - start)  # one read; what is written over costs less than another one
            await place[0].read(place[1], MemoryBuffer(old))
            head, tail = old[: guest_offset - start], old[stop - start :]
        elif place is Seen.ZEROS:
            head, tail = zeroed(guest_offset - start), zeroed(end - stop)
        else:
            head = await self._old_content(start, guest_offset)
            tail = await self._old_content(stop, end)
        await self._data.write(host_offset, head, source, tail, behind)

    async def _place_of_old(self, run: Run, start: int, end: int) -> Place | Seen:
        """Where the guest sees the clusters from *start* on, of which *run* tells the kind."""
        if run.kind == UNALLOCATED:
            place = await self._reader.find(start, end - start)
            if place is Seen.PIECES and await self._reader.reads_as_zeros(start, end - start):
                return Seen.ZEROS
            return place
        if run.kind == DATA:
            return self._data, self._geometry.round_down(run.host_offset)
        return Seen.ZEROS if run.kind in (ZERO_PLAIN, ZERO_ALLOCATED) else Seen.PIECES

    async def _old_content(self, start: int, end: int) -> memoryview:
        content = zeroed(end - start)
        if content:
            await self._reader.read(start, MemoryBuffer(content))
        return content

    async def _link(self, run: Run, first: int, nclusters: int, host_offset: int) -> None:
        """Let *nclusters* guest clusters from number *first* on, the front of *run*, be the data at *host_offset*."""
        await self._mapping.link(
            first << self._geometry.cluster_bits, self._mapping.entries.data(host_offset, nclusters)
        )
        if run.kind not in HOLDS_NOTHING:
            await self._reaper.free(self.host_clusters(run, nclusters))

    async def _link_over(self, run: Run, first: int, nclusters: int, host_offset: int) -> None:
        """The same, once the data is stable: without it the guest would miss what *run* shows."""
        freed = () if run.kind == ZERO_ALLOCATED and run.copied else self.host_clusters(run, nclusters)
        old_entries = self._mapping.entries.moved(run.entry, nclusters)
        entries = self._mapping.entries.data(host_offset, nclusters)
        await self._links.link(first << self._geometry.cluster_bits, old_entries, entries, freed)

    def host_clusters(self, run: Run, nclusters: int) -> Sequence[int]:
        """The host clusters that the first *nclusters* guest clusters of *run* refer to, and count."""
        if self._geometry.has_data_file:
            return ()
        match run.kind:
            case Kind.DATA | Kind.ZERO_ALLOCATED:
                start = self._geometry.cluster_of(run.host_offset)
                return range(start, start + nclusters)
            case Kind.COMPRESSED:
                return Payload.of(run.entry, self._mapping.entries).host_clusters(self._geometry)
            case _:
                return ()
