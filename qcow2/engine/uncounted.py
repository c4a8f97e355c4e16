"""Clusters that are referenced more often than they count: some writers do not count all they use, some damage is so.

A census shows which, before the first change. Such a cluster is not handed out, and letting go of it changes no count.
The census is taken unasked only if its reads are few: else nothing inside the file is free, until the file cannot grow.
References made later are to clusters that were handed out, hence counted: what the census says stays true.
It also takes COPIED flags from what others refer to, which an overwrite would change for them: nothing is before it.
"""

from array import array
from bisect import bisect_right
from collections.abc import Sequence

from qcow2.driver.operation import Grace, Read
from qcow2.engine.opened import Opened
from qcow2.engine.refcount import Refcounts
from qcow2.engine.rollback import Rollback
from qcow2.engine.root import Root
from qcow2.error import CorruptImage, ImageError, NotTried, no_memory
from qcow2.format.layout import ENTRY_SIZE
from qcow2.judge.census import Census, take_census
from qcow2.judge.check import is_table_alone, miscopied
from qcow2.judge.report import Report
from qcow2.plane.entry import words_of
from qcow2.plane.tally import stored_refcount

MAX_UNASKED_BYTES = 64 << 20  # of L2 tables: disks of 512 GiB with clusters of 64 KiB
MAX_UNASKED_TABLES = 4096  # one read each


class Uncounted:
    """Knows which clusters count too low; *nclusters* had the file as it was opened."""

    def __init__(self, opened: Opened, root: Root, refcounts: Refcounts, nclusters: int, ntables: int) -> None:
        self._file = opened.file
        self._geometry = opened.geometry
        self._refcounts = refcounts
        self._root = root
        self._stability = opened.stability
        self._nclusters = nclusters
        self._mapping = opened.mapping
        self._is_cheap = ntables <= min(MAX_UNASKED_TABLES, MAX_UNASKED_BYTES // opened.geometry.cluster_size)
        self._is_known = False
        self._starts: array[int] = array("Q")  # of the runs that count too low, ascending
        self._stops: array[int] = array("Q")

    @property
    def first(self) -> int:
        """No cluster below it may be handed out as long as the file can grow."""
        return 0 if self._is_known else self._nclusters

    @property
    def end(self) -> int:
        """One past the last cluster that counts too low."""
        return self._stops[-1] if self._stops else 0

    def usable(self, free: range) -> range:
        """The first run in *free*, clusters that count zero, that nothing refers to; empty, at its end, if none."""
        start, stop = min(max(free.start, self.first), free.stop), free.stop
        following = bisect_right(self._starts, start)
        if following and self._stops[following - 1] > start:
            start = min(self._stops[following - 1], stop)
        if following < len(self._starts):
            stop = min(self._starts[following], stop)
        return range(start, max(start, stop))

    async def among(self, clusters: Sequence[int]) -> set[int]:
        """Those of the *clusters* that count too low. The caller holds the mutex of the refcounts."""
        found = set(await self._refcounts.uncounted(clusters, self._nclusters))
        if self._starts:
            found.update(cluster for cluster in clusters if not self.usable(range(cluster, cluster + 1)))
        return found

    @property
    def is_due(self) -> bool:
        """Whether the census has to be taken before the first change."""
        return self._is_cheap

    async def look_if_cheap(self) -> None:
        """Take the census before the first change, if it has few tables to read; who comes meanwhile waits.

        Raises: NotTried: nothing has changed.
        """
        if self._is_cheap:
            async with self._refcounts.mutex.hold():
                if self._is_cheap:
                    try:
                        await self.look()
                    except NotTried:
                        raise  # the next change looks again
                    except (OSError, ImageError):
                        pass  # what cannot be looked at is in use
                    self._is_cheap = False  # not again, unless there is no other way

    async def look(self) -> bool:
        """Take the census; false if it has been taken. The caller holds the mutex of the refcounts.

        Raises: OSError, UnsupportedImage, CorruptImage; then no hole is usable.
        """
        if self._is_known:
            return False
        try:
            census = await self._take_census()
        except MemoryError:  # nothing has changed yet
            raise no_memory() from None
        if self._is_cheap and (self._starts or self._root.header.record.nb_snapshots):
            await self._clear_copied(census)
        if census.may_miss_shared:
            raise CorruptImage(self._file.path, 0, "not all references can be found, so no cluster is known to be free")
        self._is_known = True
        return True

    async def _take_census(self) -> Census:
        census = await take_census(self._file, self._root.header, Report())
        await self._stability.sync()  # what refers to nothing any more does so after a power loss, too
        await Grace()
        del self._starts[:], self._stops[:]
        end = census.tally.end(census.tally.nclusters)
        for index in range(-(-end // self._refcounts.per_block)):
            await self._compare(census, index, end)
        return census

    async def _clear_copied(self, census: Census) -> None:
        """Take COPIED flags from what is referenced more than once; missing ones are left, they cost a copy.

        In a cluster that guest data or another table claims they may be no flags.
        """
        async with Rollback(self._forget_tables, None):
            async for found in miscopied(census, counted=True):
                if not is_table_alone(census, census.cluster_of(found.host_offset)):
                    continue
                for index in found.indexes:
                    entry = found.entries.at(found.data, index)
                    if found.entries.is_copied(entry):
                        changed = found.entries.pack([found.entries.flipped(entry)])
                        await self._stability.write(found.host_offset + index * found.entries.nbytes, changed)
        await self._forget_tables(None)

    async def _forget_tables(self, _: None) -> None:
        """Memory has them as they were: have them read anew."""
        record = self._root.header.record
        self._mapping.forget(words_of(await Read(self._file, record.l1_table_offset, record.l1_size * ENTRY_SIZE)))

    async def _compare(self, census: Census, index: int, end: int) -> None:
        """Note the clusters of refcount block *index* that are referenced more often than they count."""
        first, order = index * self._refcounts.per_block, self._geometry.refcount_order
        block = await self._refcounts.content(index)
        nentries = min(self._refcounts.per_block, end - first)
        for cluster in census.tally.differing(block, order, first, nentries):
            if stored_refcount(block, order, cluster - first) < census.tally.count(cluster):
                self._note(cluster)

    def _note(self, cluster: int) -> None:
        if self._stops and self._stops[-1] == cluster:
            self._stops[-1] = cluster + 1
        else:
            self._starts.append(cluster)
            self._stops.append(cluster + 1)
