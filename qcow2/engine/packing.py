"""Compressed writes: whole guest clusters, their payloads packed one behind the other into shared host clusters.

A payload that is longer than the rest of the host cluster that the cursor is in goes on in the next one, if that is
free, else it begins a new one. The cursor holds a reference of its own, so its cluster cannot become free under it; a
death leaves that as a leak. Payloads and counts are stable before entries lead to them: one sync for as many clusters
as are written together.
"""

from collections.abc import Sequence
from functools import partial

from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.operation import Compute, Signal, Spawn, Write
from qcow2.engine.compressed import packer
from qcow2.engine.links import Links
from qcow2.engine.opened import Opened
from qcow2.engine.part import Part
from qcow2.engine.rangelock import Mutex
from qcow2.engine.rollback import Rollback
from qcow2.engine.root import Root
from qcow2.engine.space import Space
from qcow2.engine.table import Tables
from qcow2.engine.write import Writer

STEP_BYTES = 4 << 20  # linked together, within a slice
PART_BYTES = 256 << 10  # compressed in one go, beside others


class Packer(Part):
    """Writes compressed clusters of one image."""

    def __init__(self, opened: Opened, root: Root, space: Space, links: Links, tables: Tables, writer: Writer) -> None:
        super().__init__(opened, root, space)
        self._tables = tables
        self._links = links
        self._writer = writer
        self._compressed = opened.compressed
        self._mutex = Mutex()
        self._host: int | None = None  # the cluster that the cursor is in, which counts one for it
        self._inside = 0

    async def write(self, guest_offset: int, source: memoryview, level: int | None = None) -> None:
        """Put *source*, whole clusters but for the disk's last one, at *guest_offset*.

        Those that get no smaller are written as ever. Process-safe on return.
        Raises: OSError, CorruptImage; then nothing, a part or all of it is written.
        """
        size, done = self._geometry.cluster_size, 0
        while done < len(source):
            start = guest_offset + done
            room = min(max(size, STEP_BYTES), self._geometry.slice_end(start) - start)
            clusters = [source[at : at + size] for at in range(done, min(done + room, len(source)), size)]
            streams = await self._packed(clusters, level)
            await self._write_slice(start, clusters, streams)
            done += sum(map(len, clusters))

    async def _packed(self, clusters: Sequence[memoryview], level: int | None) -> list[bytes]:
        """The streams of *clusters*, compressed in parts side by side, where the driver has threads."""
        npart = max(1, PART_BYTES // self._geometry.cluster_size)
        parts = [clusters[first : first + npart] for first in range(0, len(clusters), npart)]
        streams: dict[int, list[bytes]] = {}
        errors: list[BaseException] = []
        ended = Signal()

        async def pack(index: int) -> None:
            try:
                streams[index] = await Compute(partial(self._pack, parts[index], level))
            except BaseException as error:  # raised below, when nobody uses *clusters* any more
                errors.append(error)
            if len(streams) + len(errors) == len(parts):
                ended.set()

        for index in range(1, len(parts)):
            await Spawn(pack(index))
        await pack(0)
        await ended.wait()
        if errors:
            raise errors[0]
        return [stream for index in range(len(parts)) for stream in streams[index]]

    def _pack(self, clusters: Sequence[memoryview], level: int | None) -> list[bytes]:
        pack, size = packer(self._compressed.compression_type, level), self._geometry.cluster_size
        return [pack(each if len(each) == size else memoryview(bytes(each).ljust(size, b"\0"))) for each in clusters]

    async def _write_slice(self, guest_offset: int, clusters: Sequence[memoryview], streams: Sequence[bytes]) -> None:
        """Write clusters of one slice; each run of *streams* is linked together."""
        first, size = 0, self._geometry.cluster_size
        while first < len(clusters):
            end = first
            while end < len(clusters) and streams[end]:
                end += 1
            where = guest_offset + first * size
            if end > first:
                await self._write_streams(where, streams[first:end])
            else:
                end += 1
                await self._writer.write(where, MemoryBuffer(clusters[first]))
            first = end

    async def _write_streams(self, guest_offset: int, streams: Sequence[bytes]) -> None:
        first = self._geometry.cluster_of(guest_offset)
        async with self._writer.locks.hold(first, first + len(streams) - 1):
            await self._tables.require_private(guest_offset)
            if self._links.is_waiting(guest_offset, len(streams)):
                await self._links.commit()
            old = await self._old_clusters(guest_offset, len(streams))
            taken: list[int] = []
            async with Rollback(self._reaper.free, taken):
                entries = [await self._put(stream, taken) for stream in streams]
                await self._root.allow_uncounted()
                await self._stability.sync()
                for entry in entries:
                    self._compressed.forget(entry)
                await self._mapping.link(guest_offset, entries)
            await self._reaper.free(old)

    async def _old_clusters(self, guest_offset: int, nclusters: int) -> list[int]:
        """The host clusters that the guest clusters refer to now."""
        end = min(guest_offset + (nclusters << self._geometry.cluster_bits), self._geometry.size)
        old: list[int] = []
        size = self._geometry.cluster_size
        for start in range(guest_offset, end, size):  # one by one: with subclusters a run may be a part of one
            run = await self._mapping.resolve(start, min(size, end - start))
            old += self._writer.subclusters.host_clusters(run.entry)
        return old

    async def _put(self, stream: bytes, taken: list[int]) -> int:
        """Write *stream* to a place of its own; the entry that leads to it. Its host cluster is counted, in *taken*."""
        async with self._mutex.hold():
            host_offset = await self._take(len(stream), taken)
        entry = self._mapping.entries.descriptor(host_offset, len(stream))
        await Write(self._file, host_offset, stream)  # not a byte more: the next one of the sector may be under way
        return entry

    async def _take(self, nbytes: int, taken: list[int]) -> int:
        """Where in the file *nbytes* go; their host clusters are counted for them, in *taken*."""
        host, inside, bits = self._host, self._inside, self._geometry.cluster_bits
        rest = 0 if host is None else self._geometry.cluster_size - inside
        if host is not None and nbytes <= rest and await self._count(host):
            taken.append(host)
            self._inside += nbytes
            return (host << bits) + inside
        (new,) = await self._allocator.allocate(1)
        taken.append(new)
        goes_on = host is not None and 0 < rest < nbytes and new == host + 1 and await self._count(host)
        if goes_on and host is not None:
            taken.append(host)
        await self._leave()
        if await self._count(new):  # for the cursor
            self._host, self._inside = new, nbytes - rest if goes_on else nbytes
        return ((new << bits) - rest) if goes_on else new << bits

    async def _count(self, host: int) -> bool:
        """Count *host* once more; False if its refcount is too narrow."""
        try:
            async with self._refcounts.mutex.hold():
                await self._refcounts.add([host], 1)
        except OverflowError:
            return False
        return True

    async def _leave(self) -> None:
        host, self._host = self._host, None
        if host is not None:
            await self._reaper.free([host])

    async def close(self) -> None:
        """Give the cursor's reference back."""
        async with self._mutex.hold():
            await self._leave()
