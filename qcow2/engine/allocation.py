"""Allocation: host clusters handed out from a reserved run.

Every cluster handed out is counted (accurate: stable on the disk; lazy: in memory), lies inside the file's stable
length, and reads as zeros, stable too. So whoever gets one may write plain data and link it without any sync. In an
encrypted image it is what decrypts to zeros, so whoever wants one for metadata says so, and waits for a sync. Who
syncs before the link anyway takes clusters of which all this is true after that sync only, and does not wait for one.
"""

import errno
import os
from collections.abc import Callable, Collection, Coroutine
from contextlib import suppress
from typing import Any

from qcow2.driver.operation import Signal, Spawn, Zero
from qcow2.engine.opened import Opened
from qcow2.engine.reaper import Reaper
from qcow2.engine.refcount import Refcounts
from qcow2.engine.reservation import Reservations, lacks_room
from qcow2.engine.rollback import Rollback
from qcow2.engine.root import Root
from qcow2.error import CorruptImage, ImageError, NotTried, no_memory
from qcow2.plane.stock import Stock

FIRST_RUN_BYTES = 256 << 10
MAX_RUN_BYTES = 4 << 20  # what a crash may leak, four times
MAX_LAZY_RUN_BYTES = 128 << 20  # a lazy image has its refcounts rebuilt after a crash; each run takes a sync
MAX_LAZY_BLANK_BYTES = 16 << 20  # of an encrypted one they are written
BLANK_BYTES = 256 << 10  # encrypted at a time


class Allocator:
    """Hands out host clusters; the only one that takes free ones."""

    def __init__(
        self,
        opened: Opened,
        root: Root,
        refcounts: Refcounts,
        reaper: Reaper,
        reservations: Reservations,
    ) -> None:
        self._file = opened.file
        self._data = opened.data
        has_key = opened.data.native is not None  # without it nobody writes data
        # What is handed out may become a cluster of the disk; not so where those are in another file.
        self._blanks = opened.data.is_encrypted and has_key and not opened.geometry.has_data_file
        self._geometry = opened.geometry
        self._refcounts = refcounts
        self._root = root
        self._mapping = opened.mapping
        self._reaper = reaper
        self._stability = opened.stability
        self._statistics = opened.statistics
        self._reservations = reservations
        self._stock = Stock()  # reserved, not yet handed out
        self._unsynced = Stock()  # reserved, but stable after the next sync only
        opened.mapping.cache.set_stock(self._stock.native, self._unsynced.native)
        self._under_way: Signal | None = None  # of the reservation in progress
        self._gathering: Signal | None = None  # of the one for `allocate_unsynced`
        self._low = 0  # at so many the next reservation begins
        self._low_unsynced = 0  # the same for copies
        self._next_bytes = FIRST_RUN_BYTES
        most_if_lazy = MAX_LAZY_BLANK_BYTES if self._blanks else MAX_LAZY_RUN_BYTES
        self._max_bytes = most_if_lazy if root.is_lazy else MAX_RUN_BYTES

    async def allocate(self, nclusters: int) -> range:
        """Take at least one and at most *nclusters* consecutive host clusters.

        Raises: OSError; ENOSPC leaves everything as it was. CorruptImage.
        """
        await self.collect()
        while not self._stock:
            await self._refill(nclusters)
        self._stability.require_trust()
        taken = self._stock.take(nclusters)
        if len(self._stock) <= self._low and self._under_way is None and self._reservations.room:
            await Spawn(self._ahead(self._reserve_once))
        return taken

    async def allocate_zeros(self) -> range:
        """Take one host cluster as from `allocate`, which holds zeros as they are: for metadata."""
        taken = await self.allocate(1)
        if self._blanks:
            async with Rollback(self._reaper.free, taken):
                await Zero(self._file, taken.start << self._geometry.cluster_bits, self._geometry.cluster_size)
                await self._stability.sync()
        return taken

    async def stock_up(self) -> None:
        """Have as much to hand out at once as those want who write a lot. Raises: as `allocate`."""
        self._next_bytes = max(self._next_bytes, MAX_RUN_BYTES)
        if not self._stock and self._reservations.room:
            await self._refill(1)
        if not self._unsynced and self._reservations.room:
            await self._gather(1)

    async def allocate_unsynced(self, nclusters: int) -> range:
        """Take clusters as from `allocate` that keep its promises after the next sync only.

        For who syncs before the link: the sync of a reservation would wait for all that was copied before.
        """
        await self.collect()
        while not self._unsynced:
            if self._gathering is not None:
                await self._gathering.wait()
            else:
                await self._gather(nclusters)
        self._stability.require_trust()
        taken = self._unsynced.take(nclusters)
        if len(self._unsynced) <= self._low_unsynced and self._gathering is None and self._reservations.room:
            await Spawn(self._ahead(self._gather_once))
        return taken

    async def _gather(self, nclusters: int) -> None:
        self._stability.require_trust()
        if self._stock and not self._reservations.room:
            self._unsynced.add([self._stock.take(nclusters)])
            return
        try:
            await self._gather_once(max(nclusters, self._run_length()))
        except OSError as error:
            if not lacks_room(error) or not self._stock:
                raise
            self._unsynced.add([self._stock.take(nclusters)])

    async def _gather_once(self, wanted: int) -> None:
        if self._gathering is not None:
            return
        self._gathering = ended = Signal()
        try:
            self._unsynced.keep(0)
            self._unsynced.add(await self._reservations.reserve_what_fits(wanted))
            self._low_unsynced = len(self._unsynced) // 2
        finally:
            self._gathering = None
            self._unsynced.keep(self._low_unsynced)
            ended.set()

    def allow_links(self) -> None:
        """What must be stable before a cluster of the stock may be linked is: the extent map may link them, too."""
        self._stock.open()
        self._unsynced.open()

    async def collect(self) -> None:
        """See to what the extent map has done meanwhile."""
        linked, copied = self._stock.take_linked(), self._unsynced.take_linked()
        self._statistics.clusters_allocated += linked + copied
        self._statistics.metadata_writes += linked
        self._statistics.copies += copied
        self._hear_of_failure()  # whatever leads to a cluster whose entry could not be written, it is given to nobody
        if spoiled := [*self._stock.take_spoiled(), *self._unsynced.take_spoiled()]:
            await self._reaper.free(spoiled)

    def require_links(self) -> None:
        """Raises: OSError(EIO) if the extent map could not write an entry or the log's mark: no more writes then."""
        self._hear_of_failure()
        self._stability.require_trust()

    def _hear_of_failure(self) -> None:
        if number := self._mapping.cache.error:
            self._stability.fail(OSError(number, os.strerror(number), self._file.path))

    async def allocate_area(self, nclusters: int) -> range:
        """Take exactly *nclusters* consecutive host clusters, past everything in the file; in it where it cannot grow.

        There also of what was reserved ahead: nothing else is under way.
        They are as any others that are handed out, except that this is stable after the next sync only.
        Raises: OSError; ENOSPC leaks a part of the area at worst. CorruptImage.
        """
        try:
            return await self._take_area(nclusters, may_grow=True)
        except OSError as error:
            if not lacks_room(error):
                raise
            lack = error.errno or errno.ENOSPC
        await self._reservations_end()
        try:
            return await self._take_area(nclusters, may_grow=False)
        except OSError as error:
            if not lacks_room(error):
                raise
            raise OSError(lack, os.strerror(lack), self._file.path) from None

    async def _take_area(self, nclusters: int, *, may_grow: bool) -> range:
        while True:
            async with self._refcounts.mutex.hold():
                if not may_grow:
                    await self._give_back()
                area = await self._reservations.find_area(nclusters, may_grow=may_grow)
                missing = self._reservations.missing_blocks(area)
                if not missing:
                    await self._reservations.prepare(area)
                    await self._refcounts.add(area, 1)
                    break
                if missing[-1] >= len(self._refcounts.table):
                    await self._reservations.grow_table(missing[-1])
                    continue
            for index in missing:  # which may end in the way of the area: then look again
                await self._place_block(index)
        return area

    async def _place_block(self, index: int) -> None:
        """Make refcount block *index* in a cluster of the run, so that all that it counts stays free."""
        cluster = await self.allocate_zeros()
        async with Rollback(self._reaper.free, cluster):
            await self._root.allow_uncounted()
            async with self._refcounts.mutex.hold():
                if not self._refcounts.has_block(index):
                    await self._refcounts.link_block(index, cluster.start)
                    self._mapping.own_metadata(cluster)
                    return
        await self._reaper.free(cluster)  # the run that was reserved ahead has needed the block, too

    async def _refill(self, nclusters: int) -> None:
        """Reserve a run, or wait for the reservation in progress."""
        self._stability.require_trust()
        if self._under_way is not None:
            await self._under_way.wait()
            return
        await self._reserve_once(max(nclusters, self._run_length()))

    async def _ahead(self, reserve: Callable[[int], Coroutine[Any, Any, None]]) -> None:
        """Reserve before the last cluster is taken: nobody waits then, nor does all that is under way enter Python."""
        try:
            with suppress(OSError, CorruptImage):  # who needs the clusters meets the error again
                await reserve(self._run_length())
        except MemoryError:
            self._stability.fail(no_memory())

    async def _reserve_or_take_back(self, wanted: int) -> list[range]:
        """Reserve *wanted* clusters; without room, or need for more, take what was meant for copies."""
        if self._unsynced and not self._reservations.room:
            return self._unsynced.take_all()
        try:
            return await self._reservations.reserve_what_fits(wanted)
        except OSError as error:
            if not lacks_room(error) or not self._unsynced:
                raise
            return self._unsynced.take_all()

    async def _reserve_once(self, wanted: int) -> None:
        """Reserve, make it stable and put it into the stock, unless somebody is at it.

        Until that has ended the extent map may take all that is left.
        """
        if self._under_way is not None:
            return
        self._under_way = ended = Signal()
        try:
            self._stock.keep(0)
            areas = await self._reserve_or_take_back(wanted)
            try:
                for area in areas:
                    await self._blank(area)
                await self._stability.sync()
            except OSError as error:
                if isinstance(error, NotTried) or lacks_room(error):
                    self._unsynced.add(areas)
                raise
            self._stock.add(areas)
            self._low = len(self._stock) // 2
        finally:
            self._under_way = None
            self._stock.keep(self._low)
            ended.set()

    async def _blank(self, area: range) -> None:
        """Let *area* decrypt to zeros, if it may hold what is encrypted."""
        if not self._blanks:
            return
        bits = self._geometry.cluster_bits
        offset, end = area.start << bits, area.stop << bits
        while offset < end:
            nbytes = min(BLANK_BYTES, end - offset)
            await self._data.write(offset, bytes(nbytes))
            offset += nbytes

    def _run_length(self) -> int:
        """How many clusters to reserve: more each time, but little of a small disk."""
        nbytes = min(self._next_bytes, self._geometry.size // 8)
        self._next_bytes = min(2 * self._next_bytes, self._max_bytes)
        return max(1, self._geometry.clusters(nbytes))

    async def close(self) -> None:
        """Give what was reserved in vain back, write all refcounts, cut the file after its last used cluster.

        Nothing else is under way. Process-safe on return.
        """
        await self._reservations_end()
        async with self._refcounts.mutex.hold():
            await self._give_back()
            await self._refcounts.write_all()
            await self._reservations.cut()

    async def _reservations_end(self) -> None:
        while signal := self._under_way or self._gathering:
            await signal.wait()

    async def cut_off(self) -> None:
        """Let the file be cut at the next `close` after what is used, also of what was in it when it was opened.

        Unless it is not known what is used.
        """
        await self._reaper.drain()
        with suppress(OSError, ImageError):
            async with self._refcounts.mutex.hold():
                await self._reservations.let_cut()
            await self._drop_blocks()

    async def _drop_blocks(self) -> None:
        """Free the refcount blocks that count nothing any more, and those that counted only these."""
        indexes: Collection[int] = range(len(self._refcounts.table))
        while indexes:
            async with self._refcounts.mutex.hold():
                counted = await self._reservations.drop_blocks(indexes)
            await self._reaper.free(counted)
            await self._reaper.drain()
            indexes = {self._refcounts.block_of(cluster) for cluster in counted}

    async def _give_back(self) -> None:
        """Count what was reserved in vain down again.

        Raises: OSError, also if the image referred to such a cluster, free as it was, and has let go of it meanwhile.
        """
        try:
            for area in [*self._stock.take_all(), *self._unsynced.take_all()]:
                await self._refcounts.add(area, -1)
                self._reservations.reuse(area.start)
        except OverflowError as error:
            contradiction = OSError(errno.EIO, str(error), self._file.path)
            self._stability.fail(contradiction)
            raise contradiction from error
