"""Writes to images with subclusters: what is copied, zeroed or completed is a subcluster, what is allocated a cluster.

A subcluster that is not data yet may hold anything in its host cluster: what is left of an older write, or of another
program. So it is written whole, and only then named (law 3): stable, or by a link that waits. A cluster just handed
out is stable zeros: what showed zeros before may be named at once.
"""

from collections.abc import Sequence

from qcow2.driver.buffer import MemoryBuffer, zeroed
from qcow2.driver.operation import Buffer
from qcow2.engine.compressed import Payload
from qcow2.engine.links import Links
from qcow2.engine.opened import Opened
from qcow2.engine.part import Part
from qcow2.engine.rollback import Rollback
from qcow2.engine.root import Root
from qcow2.engine.space import Space
from qcow2.format.layout import SECTOR_SIZE
from qcow2.plane.l2cache import Kind


class Subclusters(Part):
    """Changes clusters part by part. Whoever calls holds their locks, and has made their table private."""

    def __init__(self, opened: Opened, root: Root, space: Space, links: Links) -> None:
        super().__init__(opened, root, space)
        self._entries = opened.mapping.entries
        self._links = links

    async def write(self, guest_offset: int, source: Buffer) -> int:
        """Write the front of *source*, which lies in one slice; how many bytes."""
        if self._geometry.has_data_file:
            return await self._write_own_place(guest_offset, source)
        entry = await self._entry(guest_offset)
        in_cluster = guest_offset % self._geometry.cluster_size
        inside = source.slice(0, min(len(source), self._geometry.cluster_size - in_cluster))
        if self._entries.is_compressed(entry):
            await self._move(guest_offset, inside, entry)
        elif not self._entries.host_offset(entry):
            return await self._write_fresh(guest_offset, source, entry)
        elif self._entries.is_copied(entry):
            await self._write_into(guest_offset, inside, entry)
        else:
            await self._move(guest_offset, inside, entry)
        return len(inside)

    async def _entry(self, guest_offset: int) -> int:
        run = await self._mapping.resolve(guest_offset, 1)
        return run.entry

    def _span(self, guest_offset: int, nbytes: int) -> tuple[int, int]:
        """The subclusters of one cluster that the range touches, first and last."""
        in_cluster, unit = guest_offset % self._geometry.cluster_size, self._geometry.subcluster_size
        return in_cluster // unit, (in_cluster + nbytes - 1) // unit

    async def _completed(self, guest_offset: int, source: Buffer) -> tuple[int, list[memoryview | Buffer]]:
        """*source* with what the guest sees around it in its first and last subcluster; where that begins.

        What is data already is left alone: nobody completes what is whole.
        """
        unit, stop = self._geometry.subcluster_size, guest_offset + len(source)
        start, end = guest_offset - guest_offset % unit, stop + -stop % unit
        if self._geometry.has_data_file and not self._ends_whole:  # the file may end where the disk does
            end = min(end, self._geometry.size + -self._geometry.size % SECTOR_SIZE)
        head, tail = zeroed(0), zeroed(0)
        if start < guest_offset and not await self._is_data(guest_offset):
            head = await self._content(start, guest_offset)
        if stop < end and not (stop < self._geometry.size and await self._is_data(stop)):
            tail = await self._content(stop, end)
        return guest_offset - len(head), [head, source, tail]

    async def _is_data(self, guest_offset: int) -> bool:
        run = await self._mapping.resolve(guest_offset, 1)
        return run.kind == Kind.DATA

    async def _content(self, start: int, end: int) -> memoryview:
        """What the guest sees; past the end of the disk zeros."""
        content = zeroed(end - start)
        inside = min(end, self._geometry.size) - start
        if inside > 0:
            await self._reader.read(start, MemoryBuffer(content[:inside]))
        return content

    async def _write_into(self, guest_offset: int, source: Buffer, entry: int) -> None:
        """Write to a host cluster that is there: the data, then the bits that name it."""
        host_offset = self._entries.host_offset(entry)
        start, pieces = await self._completed(guest_offset, source)
        await self._data.write(host_offset + start % self._geometry.cluster_size, *pieces)
        new = self._entries.written(entry, host_offset, *self._span(guest_offset, len(source)))
        if new != entry:
            await self._root.allow_uncounted()
            await self._links.link(self._geometry.round_down(guest_offset), [entry], [new], ())

    async def _write_own_place(self, guest_offset: int, source: Buffer) -> int:
        """Write to clusters of the external data file, in which anything may be where they are no data yet.

        As `Writer` does it where there are no subclusters: see there.
        """
        bits = self._geometry.cluster_bits
        own = range(guest_offset >> bits, (guest_offset + len(source) - 1 >> bits) + 1)
        start = own.start << bits
        old = [await self._entry(cluster << bits) for cluster in own]
        new = self._written(guest_offset, len(source), old, own)
        self._statistics.clusters_allocated += sum(not self._entries.has_cluster(entry) for entry in old)
        if new == old:
            await self._data.write(guest_offset, source)
        elif self._root.header.record.has_raw_data:
            await self._blank(guest_offset, guest_offset + len(source))
            await self._mapping.link_stable(start, old, new)
            await self._data.write(guest_offset, source)
        elif await self._are_zeros(own, old):
            await self._data.write(guest_offset, source)
            await self._mapping.link(start, self._entries.data(start, len(own)))
        else:
            first, pieces = await self._completed(guest_offset, source)
            await self._data.write(first, *pieces)
            await self._links.link(start, old, new, ())
        return len(source)

    async def _blank(self, guest_offset: int, end: int) -> None:
        """Zeros in the places of the subclusters that the range touches and that are no data yet."""
        unit = self._geometry.subcluster_size
        at, end = guest_offset - guest_offset % unit, min(end + -end % unit, self._geometry.size)
        while at < end:
            run = await self._mapping.resolve(at, end - at)
            if run.kind != Kind.DATA:
                await self._data.zero(at, run.nbytes)
            at += run.nbytes

    async def _are_zeros(self, own: range, entries: Sequence[int]) -> bool:
        """Whether the clusters *own* with these *entries* show zeros and are stable zeros; from now on nobody knows."""
        untouched, bits = self._mapping.cache.untouched, self._geometry.cluster_bits
        assert untouched is not None
        self._allocator.allow_links()
        start, end = own.start << bits, min(own.stop << bits, self._geometry.size)
        is_empty = not any(map(self._entries.has_cluster, entries)) and untouched.has(own)
        untouched.forget(own)
        return is_empty and await self._reader.reads_as_zeros(start, end - start)

    async def _write_fresh(self, guest_offset: int, source: Buffer, entry: int) -> int:
        """Write to new clusters where there are none, as many as come in one piece; how many bytes."""
        bits, size = self._geometry.cluster_bits, self._geometry.size
        old = await self._empty_entries(guest_offset, len(source), entry)
        start = self._geometry.round_down(guest_offset)
        end = min(start + (len(old) << bits), size)
        shows_zeros = await self._reader.reads_as_zeros(start, end - start)
        allocate = self._allocator.allocate if shows_zeros else self._allocator.allocate_unsynced
        new = await allocate(len(old))
        source = source.slice(0, min(len(source), start + (len(new) << bits) - guest_offset))
        async with Rollback(self._reaper.free, new):
            if shows_zeros:
                await self._data.write((new.start << bits) + guest_offset - start, source)
                entries = self._entries.data(new.start << bits, len(new))
            else:
                entries = self._written(guest_offset, len(source), old, new)
                first, pieces = await self._completed(guest_offset, source)
                await self._data.write((new.start << bits) + first - start, *pieces)
                self._statistics.copies += len(new)
            await self._root.allow_uncounted()
            self._allocator.allow_links()
            if shows_zeros:
                await self._mapping.link(start, entries)
            else:
                await self._links.link(start, old[: len(new)], entries, ())
        self._statistics.clusters_allocated += len(new)
        return len(source)

    async def _empty_entries(self, guest_offset: int, nbytes: int, entry: int) -> list[int]:
        """The entries, *entry* the first, of the clusters in front of the range that have no host cluster."""
        entries = [entry]
        at = self._geometry.round_down(guest_offset) + self._geometry.cluster_size
        while at < guest_offset + nbytes:
            following = await self._entry(at)
            if self._entries.is_compressed(following) or self._entries.host_offset(following):
                break
            entries.append(following)
            at += self._geometry.cluster_size
        return entries

    def _written(self, guest_offset: int, nbytes: int, old: Sequence[int], new: range) -> list[int]:
        """The entries of the clusters *new* for *old*, when the range is written."""
        size, entries = self._geometry.cluster_size, []
        cluster_start = self._geometry.round_down(guest_offset)
        for entry, host in zip(old, new, strict=False):
            start = max(guest_offset, cluster_start)
            end = min(guest_offset + nbytes, cluster_start + size)
            span = self._span(start, end - start)
            entries.append(self._entries.written(entry, host << self._geometry.cluster_bits, *span))
            cluster_start += size
        return entries

    async def _move(self, guest_offset: int, source: Buffer, entry: int) -> None:
        """Write to a new cluster in place of one that others refer to, or of a stream; what is data there is copied."""
        bits, start = self._geometry.cluster_bits, self._geometry.round_down(guest_offset)
        is_stream = self._entries.is_compressed(entry)
        new = await self._allocator.allocate_unsynced(1)
        host_offset = new.start << bits
        async with Rollback(self._reaper.free, new):
            if is_stream:
                changed = self._entries.data(host_offset)[0]
                content = await self._content(start, start + self._geometry.cluster_size)
                await self._write_over(host_offset, content, guest_offset - start, source)
            else:
                changed = self._entries.written(entry, host_offset, *self._span(guest_offset, len(source)))
                await self._copy_data(start, host_offset)
                first, pieces = await self._completed(guest_offset, source)
                await self._data.write(host_offset + first - start, *pieces)
            self._statistics.copies += 1
            await self._root.allow_uncounted()
            self._allocator.allow_links()
            await self._links.link(start, [entry], [changed], self.host_clusters(entry))
        self._statistics.clusters_allocated += 1

    async def _write_over(self, host_offset: int, content: memoryview, ahead: int, source: Buffer) -> None:
        await self._data.write(host_offset, content[:ahead], source, content[ahead + len(source) :])

    async def _copy_data(self, start: int, host_offset: int) -> None:
        """Copy the subclusters of the guest cluster at *start* that are data."""
        at, end = start, min(start + self._geometry.cluster_size, self._geometry.size)
        while at < end:
            run = await self._mapping.resolve(at, end - at)
            if run.kind == Kind.DATA:
                stop = at + run.nbytes
                content = await self._content(at, stop + -stop % self._geometry.subcluster_size)
                await self._data.write(host_offset + at - start, content)
            at += run.nbytes

    async def place(self, guest_offset: int, *, writes: bool) -> None:
        """Give the cluster at *guest_offset*, which reads as zeros and has none, a host cluster of zeros."""
        if self.host_clusters(await self._entry(guest_offset)):
            return
        bits = self._geometry.cluster_bits
        new = await self._allocator.allocate(1)
        async with Rollback(self._reaper.free, new):
            if writes:
                await self._data.write(new.start << bits, bytes(self._geometry.cluster_size))
            await self._root.allow_uncounted()
            self._allocator.allow_links()
            await self._mapping.link(guest_offset, self._entries.data(new.start << bits))
        self._statistics.clusters_allocated += 1

    async def clear(self, guest_offset: int, end: int, *, keep: bool) -> bool:
        """Let whole subclusters of one cluster read as zeros; unless *keep*, a cluster without data is let go.

        False: a stream holds the rest of the cluster, so zeros must be written.
        """
        start = self._geometry.round_down(guest_offset)
        entry = await self._entry(guest_offset)
        if self._links.is_waiting(start, 1):
            await self._links.commit()
            entry = await self._entry(guest_offset)
        cluster_end = min(start + self._geometry.cluster_size, self._geometry.size)
        is_whole = guest_offset == start and end == cluster_end
        if self._entries.is_compressed(entry):
            if not is_whole:
                return False
            new = self._entries.zeros
        else:
            first, last = self._span(guest_offset, end - guest_offset)
            last = self._span(start, self._geometry.cluster_size)[1] if end == cluster_end else last
            new = self._entries.zeroed(entry, first, last)
            if not keep and not self._entries.has_data(new):
                new = self._entries.without_cluster(new)
        if new != entry:
            await self._mapping.link(start, [new])
            is_kept = self._entries.has_cluster(new)
            if self._geometry.has_data_file and not keep and self._entries.has_cluster(entry):
                await self._give_back(*((guest_offset, end) if is_kept else (start, cluster_end)))
            await self._reaper.free(() if is_kept else self.host_clusters(entry))
        return True

    async def uncover(self, guest_offset: int) -> None:
        """Map nothing of the cluster at *guest_offset* any more."""
        if entry := await self._entry(guest_offset):
            await self._mapping.link(guest_offset, [0])
            await self._reaper.free(self.host_clusters(entry))

    def host_clusters(self, entry: int) -> Sequence[int]:
        """The host clusters that *entry* refers to."""
        if self._geometry.has_data_file:
            return ()
        if self._entries.is_compressed(entry):
            return Payload.of(entry, self._entries).host_clusters(self._geometry)
        first = self._geometry.cluster_of(self._entries.host_offset(entry))
        return range(first, first + 1) if first else ()
