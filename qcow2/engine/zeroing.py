"""Write-zeroes and discard: entries that say zeros instead of data that holds them."""

from qcow2.driver.buffer import MemoryBuffer, zeroed
from qcow2.engine.links import Links
from qcow2.engine.opened import Opened
from qcow2.engine.part import Part
from qcow2.engine.root import Root
from qcow2.engine.space import Space
from qcow2.engine.table import Tables
from qcow2.engine.write import Writer
from qcow2.format.layout import MAX_CLUSTER_SIZE
from qcow2.plane.l2cache import Kind, Run

STEP = MAX_CLUSTER_SIZE  # bytes of zeros in memory


class Zeroer(Part):
    """Makes guest ranges read as zeros, and gives their host clusters back."""

    def __init__(self, opened: Opened, root: Root, space: Space, links: Links, tables: Tables, writer: Writer) -> None:
        super().__init__(opened, root, space)
        self._is_raw = root.header.record.has_raw_data  # it is to be the same disk as a raw image at any time
        self._writer = writer
        self._tables = tables
        self._links = links

    async def write_zeroes(self, guest_offset: int, nbytes: int, *, unmap: bool) -> None:
        """Make the range read as zeros; clusters it covers are let go with *unmap*, kept without if they can be."""
        end = guest_offset + nbytes
        if self._is_raw:
            await self._zero_in_place(guest_offset, end)
            return
        first, last = self._covered(guest_offset, end)
        if not self._mapping.cache.can_say_zeros or first >= last:
            await self._write_zeros(guest_offset, end)
            return
        await self._write_zeros(guest_offset, first)
        await self._clear(first, last, keep=not unmap and self._geometry.version >= 3)
        await self._write_zeros(last, end)

    async def discard(self, guest_offset: int, nbytes: int) -> None:
        """Let go of the clusters that the range covers, if zeros can be told from the backing file; a hint."""
        if self._is_raw:
            if not self._data.is_encrypted:  # else it would cost space
                await self._zero_in_place(guest_offset, guest_offset + nbytes)
            return
        first, last = self._covered(guest_offset, guest_offset + nbytes)
        if self._mapping.cache.can_say_zeros and first < last:
            await self._clear(first, last, keep=False, is_hint=True)

    async def uncover(self, guest_offset: int, end: int) -> None:
        """Map nothing of the range any more, whole clusters of one table: what is below shows. Nobody else acts."""
        while guest_offset < end:
            run = await self._mapping.resolve(
                guest_offset, min(end, self._geometry.slice_end(guest_offset)) - guest_offset
            )
            if self._geometry.has_subclusters:
                if self._mapping.has_table(guest_offset):
                    await self._tables.require_private(guest_offset)
                    await self._writer.subclusters.uncover(guest_offset)
                run = run._replace(nbytes=self._geometry.cluster_size)
            elif run.kind != Kind.UNALLOCATED:
                await self._tables.require_private(guest_offset)
                nclusters = self._geometry.clusters(run.nbytes)
                await self._mapping.link(guest_offset, [0] * nclusters)
                await self._reaper.free(self._writer.host_clusters(run, nclusters))
            guest_offset += run.nbytes

    async def cover(self, guest_offset: int, end: int) -> None:
        """Say zeros, or hold them where version 2 cannot, for a run of one slice that maps nothing; it is locked.

        Version 2 without a backing file says zeros by mapping nothing, which is not said any more over another one.
        """
        if self._geometry.version < 3:
            for start in range(guest_offset, end, STEP):
                await self._writer.write_held(start, MemoryBuffer(zeroed(min(STEP, end - start))))
        elif self._geometry.has_subclusters:
            await self._clear_parts(guest_offset, end, keep=False, is_hint=False)
        else:
            run = await self._mapping.resolve(guest_offset, end - guest_offset)
            await self._clear_run(run, guest_offset, keep=False)

    async def _zero_in_place(self, guest_offset: int, end: int) -> None:
        """Zeros in the data file, which is the same disk as a raw image, and in no entry; the host decides on space.

        What an entry of another writer's calls zeros is zeros there, too. Encrypted ones are written as data is.
        """
        if self._data.is_encrypted:
            for start in range(guest_offset, end, STEP):
                await self._writer.write(start, MemoryBuffer(zeroed(min(STEP, end - start))))
            return
        while guest_offset < end:
            stop = min(end, self._geometry.slice_end(guest_offset))
            async with self._writer.locks.hold(
                self._geometry.cluster_of(guest_offset), self._geometry.cluster_of(stop - 1)
            ):
                await self._data.zero(guest_offset, stop - guest_offset)
            guest_offset = stop

    def _covered(self, guest_offset: int, end: int) -> tuple[int, int]:
        """Where the clusters, or subclusters, inside the range begin and end; the disk's last one may be partial."""
        unit = self._geometry.subcluster_size
        last = end if end == self._geometry.size else end - end % unit
        return guest_offset + -guest_offset % unit, last

    async def _write_zeros(self, guest_offset: int, end: int) -> None:
        """Zeros as data, unless zeros are there."""
        for start in range(guest_offset, end, STEP):
            nbytes = min(STEP, end - start)
            if not await self._reader.reads_as_zeros(start, nbytes):
                await self._writer.write(start, MemoryBuffer(zeroed(nbytes)))

    async def _clear(self, guest_offset: int, end: int, *, keep: bool, is_hint: bool = False) -> None:
        """Clear whole clusters, slice by slice; the lock is never held for longer than that."""
        while guest_offset < end:
            run = await self._mapping.resolve(guest_offset, end - guest_offset)
            if await self._needs_no_change(run, guest_offset, keep=keep):
                guest_offset += run.nbytes
                continue
            stop = min(end, self._geometry.slice_end(guest_offset))
            first, last = self._geometry.cluster_of(guest_offset), self._geometry.cluster_of(stop - 1)
            async with self._writer.locks.hold(first, last):
                await self._clear_locked(guest_offset, stop, keep=keep, is_hint=is_hint)
            guest_offset = stop

    async def _clear_locked(self, guest_offset: int, end: int, *, keep: bool, is_hint: bool) -> None:
        if self._geometry.has_subclusters:
            await self._clear_parts(guest_offset, end, keep=keep, is_hint=is_hint)
            return
        while guest_offset < end:
            run = await self._mapping.resolve(guest_offset, end - guest_offset)
            if not await self._needs_no_change(run, guest_offset, keep=keep):
                await self._clear_run(run, guest_offset, keep=keep)
            guest_offset += run.nbytes

    async def _clear_parts(self, guest_offset: int, end: int, *, keep: bool, is_hint: bool) -> None:
        """The same where clusters have subclusters."""
        await self._tables.require_private(guest_offset)
        while guest_offset < end:
            stop = min(end, self._geometry.round_down(guest_offset) + self._geometry.cluster_size)
            if not await self._writer.subclusters.clear(guest_offset, stop, keep=keep) and not is_hint:
                await self._writer.write_held(guest_offset, MemoryBuffer(zeroed(stop - guest_offset)))
            guest_offset = stop

    async def _needs_no_change(self, run: Run, guest_offset: int, *, keep: bool) -> bool:
        match run.kind:
            case Kind.ZERO_PLAIN:
                return True
            case Kind.ZERO_ALLOCATED:
                return keep
            case Kind.UNALLOCATED:
                return await self._reader.reads_as_zeros(guest_offset, run.nbytes)
            case _:
                return False

    async def _clear_run(self, run: Run, guest_offset: int, *, keep: bool) -> None:
        """Let the clusters of *run*, within a slice and locked, read as zeros; those not kept are freed."""
        await self._tables.require_private(guest_offset)
        nclusters = self._geometry.clusters(run.nbytes)
        if self._links.is_waiting(guest_offset, nclusters):
            await self._links.commit()
        entries = self._mapping.entries
        if keep and run.kind == Kind.DATA and run.copied:
            await self._mapping.link(guest_offset, entries.moved(entries.zeroed(run.entry, 0, 0), nclusters))
            return
        await self._mapping.link(guest_offset, [entries.zeros] * nclusters)
        if self._geometry.has_data_file and run.kind != Kind.UNALLOCATED:
            await self._give_back(guest_offset, guest_offset + run.nbytes)
        await self._reaper.free(self._writer.host_clusters(run, nclusters))
