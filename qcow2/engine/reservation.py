"""Reservations: free host clusters, found, made part of the file and zeros, and counted; the refcounts grow for that.

All of it is stable after the next sync. Who hands them out is `qcow2.engine.allocation`.
"""

import errno
from collections.abc import Iterable
from contextlib import suppress

from qcow2.driver.operation import Resize, Zero
from qcow2.engine.foresight import Foresight
from qcow2.engine.opened import Opened
from qcow2.engine.reaper import Reaper
from qcow2.engine.refcount import Refcounts
from qcow2.engine.root import Root
from qcow2.engine.uncounted import Uncounted
from qcow2.error import MetadataOverlap
from qcow2.plane.space import lacks_space

SCANNED_BLOCKS = 4  # refcount blocks looked at for holes before a reservation goes to the end of the file
SEARCHED_CLUSTERS = 1 << 24  # clusters past the end of the file that may count as used before we give up


def lacks_room(error: OSError) -> bool:
    """Whether there is no space, or the file is as long as one can be."""
    return error.errno == errno.EFBIG or lacks_space(error)


class Reservations:
    """Takes free clusters of the file, and past its end."""

    def __init__(
        self,
        opened: Opened,
        root: Root,
        refcounts: Refcounts,
        uncounted: Uncounted,
        reaper: Reaper,
        file_size: int,
    ) -> None:
        self._file = opened.file
        self._geometry = opened.geometry
        self._refcounts = refcounts
        self._root = root
        self._mapping = opened.mapping
        self._reaper = reaper
        self._stability = opened.stability
        self._statistics = opened.statistics
        self._uncounted = uncounted
        self._file_size = file_size
        self._opened_size = file_size  # what was in the file before us is not cut off
        self._cursor = 0  # no cluster below it is free, as far as is known
        nluks = opened.geometry.clusters(root.header.luks_area[1])
        self._foresight = Foresight(opened.geometry, refcounts, nluks)

    @property
    def room(self) -> int:
        """By how many clusters the file may grow before somebody needs them; below 0: it is longer than that."""
        return self._foresight.room(self._file_size)

    def reuse(self, cluster: int) -> None:
        """*cluster* has become free: look there again."""
        self._cursor = min(self._cursor, cluster)

    async def find_area(self, nclusters: int, *, may_grow: bool) -> range:
        """That many consecutive free clusters past the end of the file, or inside it."""
        start = self._geometry.clusters(self._file_size)
        limit = start + SEARCHED_CLUSTERS + nclusters
        if not may_grow:
            await self._uncounted.look()
            start, limit = 0, self._file_size >> self._geometry.cluster_bits
        stop = start  # [start, stop) is free
        while stop - start < nclusters:
            if start + nclusters > limit:
                raise OSError(errno.ENOSPC, f"no {nclusters} clusters in a row are free", self._file.path)
            free = self._uncounted.usable(await self._refcounts.find_free(stop, start + nclusters))
            if free.start > stop:
                start = free.start
            stop = free.stop
        self._require_no_metadata(range(start, stop))
        return range(start, stop)

    def _require_no_metadata(self, free: range) -> None:
        """Raises: MetadataOverlap if a cluster of *free*, which count zero, holds metadata: what else does?"""
        if (cluster := self._mapping.first_metadata(free)) is not None:
            where = cluster << self._geometry.cluster_bits
            raise MetadataOverlap(self._file.path, where, f"metadata at {where:#x} has refcount 0, repair the image")

    def missing_blocks(self, area: range) -> list[int]:
        """The refcount blocks that *area* needs and that do not exist."""
        indexes = range(self._refcounts.block_of(area.start), self._refcounts.block_of(area[-1]) + 1)
        return [index for index in indexes if not self._refcounts.has_block(index)]

    async def reserve_what_fits(self, wanted: int) -> list[range]:
        """Reserve *wanted* clusters; on a host with hardly any room left fewer, or what is free inside the file."""
        fewer = wanted
        while True:
            try:
                return await self._reserve(fewer) or []
            except OSError as error:
                if not lacks_room(error):
                    raise
                if fewer == 1:
                    areas = await self._reserve(wanted, may_grow=False)
                    if areas is None:
                        raise
                    return areas
            fewer = max(1, fewer // 4)

    async def _reserve(self, wanted: int, *, may_grow: bool = True) -> list[range] | None:
        """Count free clusters, make them part of the file and zeros; all of this is stable after the next sync.

        None if there are none: nothing has changed. A refcount block may have taken the only one.
        """
        self._statistics.reservations += 1
        found: list[range] = []
        counted: list[range] = []
        try:
            async with self._refcounts.mutex.hold():
                found = await self._find(wanted, may_grow=may_grow)
                for area in found:
                    await self.prepare(area)
                for area in found:  # all of them are inside the file now, and a larger refcount table past them
                    counted += [await self._count(area)]
        except OSError:
            if found:
                self.reuse(found[0].start)
            if not any(counted):
                raise
        return [area for area in counted if area] if found else None

    async def _find(self, wanted: int, *, may_grow: bool) -> list[range]:
        """Free clusters: holes in the file first, if they are quickly found, then what lies past its end."""
        end = self._geometry.clusters(self._file_size)
        if not may_grow:
            if await self._uncounted.look():
                self._cursor = 0
            found, self._cursor = await self._search(self._cursor, end, wanted)
            return found
        first, room = max(self._cursor, self._uncounted.first), self.room
        scanned = self._refcounts.per_block * (self._refcounts.block_of(first) + SCANNED_BLOCKS)
        found, self._cursor = await self._search(first, min(end, scanned) if room else end, wanted)
        wanted -= sum(map(len, found))
        if room >= 0:
            wanted = min(wanted, room if found else max(room, 1))
        if wanted:
            fresh, _ = await self._search(end, end + SEARCHED_CLUSTERS, wanted)
            found += fresh
        if not found:
            raise OSError(errno.EFBIG, "refcounts past the end of the file leave no room", self._file.path)
        return found

    async def _search(self, first: int, end: int, wanted: int) -> tuple[list[range], int]:
        """Runs of free clusters in [first, end), each within one refcount block; and where to search on."""
        found: list[range] = []
        while wanted and first < end:
            free = await self._refcounts.find_free(first, end)
            area = self._uncounted.usable(free)[:wanted]
            self._require_no_metadata(range(free.start, area.stop))
            first = area.stop
            if area:
                found.append(area)
                wanted -= len(area)
        return found, first

    async def prepare(self, area: range) -> None:
        """Make *area* part of the file and zeros. Past the end of a file everything is."""
        bits = self._geometry.cluster_bits
        start, stop = area.start << bits, area.stop << bits
        if start < self._file_size:
            await Zero(self._file, start, min(stop, self._file_size) - start)
        await self._extend(stop)

    async def _extend(self, nbytes: int) -> None:
        """Let the file be *nbytes* long, if it is shorter."""
        if nbytes > self._file_size:
            await Resize(self._file, nbytes, reserve=True)
            self._file_size = nbytes
            self._mapping.set_file_end(nbytes)

    async def _count(self, area: range) -> range:
        """Count one reference to each cluster of *area*; what is left of it if its refcount block had to be made."""
        index = self._refcounts.block_of(area.start)
        if index >= len(self._refcounts.table):
            await self.grow_table(index)
        if not self._refcounts.has_block(index):
            await self._refcounts.create_block(index, area.start)
            self._mapping.own_metadata(area[:1])
            area = area[1:]
        await self._refcounts.add(area, 1)
        return area

    async def grow_table(self, index: int) -> None:
        """Move the refcount table to where it has room for entry *index*.

        Written and stable before the header points at it; the old one is freed after.
        """
        bits = self._geometry.cluster_bits
        refcounts = self._refcounts
        counted = len(refcounts.table) * refcounts.per_block
        start = max(self._geometry.clusters(self._file_size), counted, self._uncounted.end)
        plan = refcounts.plan_table(index, start, self._foresight.blocks)
        await self._extend(plan.clusters.stop << bits)
        for cluster, content in plan.content():
            await self._stability.write(cluster << bits, content)
        await self._stability.sync()
        old = range(refcounts.table_offset >> bits, refcounts.table_end >> bits)
        await self._root.set_refcount_table(start << bits, plan.table_clusters)
        refcounts.adopt(plan)
        self._mapping.own_metadata(plan.clusters)
        self._mapping.disown_metadata(old)
        await self._reaper.free(old)

    async def cut(self) -> None:
        """Cut the file after its last used cluster, but not into what was in it when it was opened.

        The mutex of the refcounts is held, and all are written.
        """
        end = await self._refcounts.find_end(self._geometry.clusters(self._file_size))
        nbytes = max(self._opened_size, end << self._geometry.cluster_bits)
        if nbytes < self._file_size:
            await Resize(self._file, nbytes)
            self._file_size = nbytes
            self._mapping.set_file_end(nbytes)

    async def let_cut(self) -> None:
        """Let `cut` cut into that, too, if it is known what is used; the mutex of the refcounts is held."""
        await self._uncounted.look()
        self._opened_size = self._uncounted.end << self._geometry.cluster_bits

    async def drop_blocks(self, indexes: Iterable[int]) -> list[int]:
        """Do without those refcount blocks that count nothing, or themselves alone.

        Those of their clusters that others count are left to free. The mutex of the refcounts is held: until it is
        stable nobody else allocates.
        Raises: OSError; then the image takes no more writes.
        """
        dropped = []
        with suppress(OSError):  # the other blocks are left; if no more writes are taken, the sync says so
            for index in indexes:
                if self._refcounts.has_block(index) and await self._refcounts.counts_itself_alone(index):
                    cluster = self._refcounts.block_offset(index) >> self._geometry.cluster_bits
                    if self._uncounted.usable(range(cluster, cluster + 1)):  # nothing else refers to it
                        await self._refcounts.unlink_block(index)
                        dropped.append(cluster)
        if dropped:
            try:
                await self._stability.sync()
            except OSError as error:  # also one that was not tried: memory has let go of what the disk has not
                self._stability.fail(error)
                raise
            self._mapping.disown_metadata(dropped)
            self.reuse(min(dropped))
        return [cluster for cluster in dropped if self._refcounts.has_block(self._refcounts.block_of(cluster))]
