"""Bitmaps that record: what every change of the disk goes through before it is made (law 11).

The exact bits are live: in memory, beside the link log, which outlives the process and not the host. What the image
holds says at least as much, at every moment and whatever a power loss leaves. The disk is cut into zones. Before the
first change in a cold zone all its bits are set in the image, and synced; then it is hot, and a change costs a look at
the zone and the bits. A zone in which nothing changes any more cools: its exact bits are written. A clean close does
that for all of them. So `in_use` is never set, and a bitmap is valid for whoever comes next: exact after a close or a
kill, with the hot zones whole after a power loss, or if somebody else comes after a kill.

The image's mark says where the live bits are. Stamp 0: no link waits, only the bits are live.
"""

import errno
import logging
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

from qcow2.driver.operation import Mark as HeaderMark
from qcow2.driver.operation import Signal, Store
from qcow2.engine.background import Background
from qcow2.engine.bitmaptable import StoredBitmap, load_bitmaps, stored_bits
from qcow2.engine.frozenbitmap import Follower, FrozenBitmap
from qcow2.engine.links import Links
from qcow2.engine.opened import Found, Opened
from qcow2.engine.part import Part
from qcow2.engine.rangelock import Mutex
from qcow2.engine.rollback import Rollback
from qcow2.engine.root import Root
from qcow2.engine.space import Space
from qcow2.engine.stability import is_harmless
from qcow2.error import CorruptImage
from qcow2.format import layout
from qcow2.format.bitmap import bitmap_directory
from qcow2.format.layout import ENTRY_SIZE, SECTOR_SIZE, BitmapFlags
from qcow2.native import ffi
from qcow2.plane.dirtybits import NONE, DirtyBits, Shape, pack_live, places
from qcow2.plane.entry import bytes_of
from qcow2.plane.linklog import MARK_OFFSET, LinkLog

log = logging.getLogger("qcow2")

AHEAD = 7  # zones that become hot together with one behind a hot one
SETTLED_MARKS = 64  # changes for each hot zone, on average: then one that saw none cools


class Batch:
    """Zones that become hot together, and those who wait for it."""

    __slots__ = ("done", "error", "zones")

    def __init__(self) -> None:
        self.zones: set[int] = set()
        self.done = Signal()
        self.error: Exception | None = None


class Bitmaps(Part):
    """The bitmaps of one image that is open for writing."""

    def __init__(self, opened: Opened, root: Root, space: Space, links: Links, found: Found) -> None:
        super().__init__(opened, root, space)
        self.stored = found.bitmaps
        self.owned = found.owned_by_bitmaps
        self.problems = found.bitmap_problems
        self._links = links
        self._log: LinkLog | None = None  # in whose memory the live bits are
        self._kept: list[StoredBitmap] = []
        self._frozen: dict[bytes, FrozenBitmap] = {}  # by name
        self._dirty = DirtyBits()
        self._live: list[Any] = []  # where the live ones are
        self._places: list[int] = []  # of the live bits, where the next process finds them in the log's memory
        self._is_live = False
        self._lacks_memory = False  # that outlives the process
        self._is_mirrored = False  # they are there besides, each change of them stored
        self._hot: set[int] = set()
        self._next = Batch()
        self._heating = Background(self._run, opened.stability)
        self._turn = Mutex()
        links.before_renewal = self.settle
        links.wanted_nbytes = self._wanted_nbytes
        self._choose()

    def _choose(self) -> None:
        """Say which bitmaps record, and have the extent map ask before it changes anything if there are any."""
        self._kept = [each for each in self.stored if each.is_kept and not each.problem]
        self._mapping.cache.set_dirty(self._dirty.native if self.records else ffi.NULL)

    @property
    def records(self) -> bool:
        """Whether there is a bitmap to record in, or one to give up."""
        return any(each.is_kept for each in self.stored)

    async def reload(self) -> None:
        """The directory in the file is another one; nothing is live.

        If it cannot be read the image takes no more writes: nobody knows where to record them. That undoes no change.
        """
        assert not self._is_live
        self._mapping.disown_metadata(self.owned)
        self.stored, self.owned = [], array("Q")
        try:
            self.stored, self.owned = await load_bitmaps(
                self._file, self._root.header, self._geometry, self._mapping.is_metadata
            )
        except (OSError, CorruptImage) as error:
            self._stability.fail(error if isinstance(error, OSError) else OSError(errno.EIO, str(error)))
        self._mapping.own_metadata(self.owned)
        self._choose()

    def directory_clusters(self) -> range:
        """The clusters of the directory; none if there is none that counts."""
        found = bitmap_directory(self._file, self._root.header)
        if found is None or not found.nb_bitmaps:
            return range(0)
        start = found.directory_offset >> self._geometry.cluster_bits
        return range(start, self._geometry.clusters(found.directory_offset + found.directory_size))

    async def mark(self, guest_offset: int, nbytes: int) -> None:
        """Note that these bytes change; process-safe on return, and not under-reported after a power loss.

        Raises: OSError; ENOSPC if there is no room for the bits.
        """
        if not nbytes:
            return
        while self.records and not (self._is_live and self._dirty.set(guest_offset, nbytes)):
            await self._heat(guest_offset, nbytes)
        if self._is_mirrored:
            await self._mirror(guest_offset, nbytes)

    async def _mirror(self, guest_offset: int, nbytes: int) -> None:
        """Bring the bits of these bytes where the next process finds them: they are not set there."""
        assert self._log is not None
        parts = []
        for index, (each, place) in enumerate(zip(self._kept, self._places, strict=True)):
            bits = each.bitmap.record.granularity_bits
            first, last = guest_offset >> bits >> 3, guest_offset + nbytes - 1 >> bits >> 3
            parts.append((place + first, bytes(self._dirty.load(index, first, last + 1 - first))))
        await Store(self._log.memory, *parts)

    # -- zones

    async def _heat(self, guest_offset: int, nbytes: int) -> None:
        """Return once the zones of these bytes have been hot; all who ask meanwhile share the syncs."""
        if not self._is_live:
            async with self._turn.hold():
                if not self._is_live:
                    await self._begin()
            if not self._is_live:
                return
        batch = self._next
        zones = self._dirty.zones_of(guest_offset, nbytes)
        batch.zones.update(zones)
        if zones.start - 1 in self._hot:  # in order, as it seems: each of the next would cost a sync
            batch.zones.update(range(zones.stop, min(zones.stop + AHEAD, int(self._dirty.native.nzones))))
        await self._heating.begin()
        await batch.done.wait()
        if batch.error is not None:
            raise batch.error

    async def _run(self) -> None:
        try:
            while self._next.zones:
                following = Batch()
                async with self._turn.hold():
                    batch, self._next = self._next, following
                    try:
                        if self._is_live:  # else it was settled meanwhile, and who waits begins again
                            await self._heat_zones(batch.zones - self._hot)
                    except Exception as error:  # the requests', which meet it above
                        batch.error = error
                    batch.done.set()
        except MemoryError as error:
            self._next.error = error
            self._next.done.set()
            raise

    async def _heat_zones(self, zones: set[int]) -> None:
        """Let all bits of *zones* be set in the image, stable; and cool others, if their time has come."""
        idle = set()
        if self._dirty.marks >= SETTLED_MARKS * len(self._hot):
            idle = set(self._dirty.take_idle(self._hot))
            self._dirty.cool(idle)
            self._hot -= idle
        await self._write_zones(zones | idle, self._hot | zones)
        await self._stability.sync()  # before any change in them can be
        self._hot |= zones
        self._dirty.heat(zones)

    async def _write_zones(self, zones: Iterable[int], hot: set[int]) -> None:
        """Write the bits of *zones*: those that are live, and all of those that are *hot*."""
        for index, each in enumerate(self._kept):
            for start, nbytes in self._sectors(each, zones):
                await self._write_bits(each, start, self._content(index, each, start, nbytes, hot))

    def _sectors(self, each: StoredBitmap, zones: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Where the bits of *zones* lie in a bitmap, in whole sectors, as few and long as possible within a cluster."""
        end = each.nbytes(self._geometry.size)
        wanted: set[int] = set()
        for zone in zones:
            first, last = self._bits(each, zone)
            wanted.update(range(first // 8 // SECTOR_SIZE, last // 8 // SECTOR_SIZE + 1))
        run: list[int] = []
        per_cluster = self._geometry.cluster_size // SECTOR_SIZE
        for sector in [*sorted(wanted), -1]:
            if run and (sector != run[-1] + 1 or sector % per_cluster == 0):
                start = run[0] * SECTOR_SIZE
                yield start, min(len(run) * SECTOR_SIZE, end - start)
                run = []
            run.append(sector)

    def _bits(self, each: StoredBitmap, zone: int) -> tuple[int, int]:
        return self._dirty.bits_of(zone, each.bitmap.record.granularity_bits, self._geometry.size)

    def _content(self, index: int, each: StoredBitmap, start: int, nbytes: int, hot: set[int]) -> bytes:
        """These bytes of the bitmap's bits as the image shall have them."""
        content = int.from_bytes(self._dirty.load(index, start, nbytes), "little")
        bits = each.bitmap.record.granularity_bits
        guest_offset = start * 8 << bits
        for zone in hot.intersection(self._dirty.zones_of(guest_offset, nbytes * 8 << bits)):
            first, last = self._bits(each, zone)
            first, last = max(first - start * 8, 0), min(last - start * 8, nbytes * 8 - 1)
            content |= ((1 << last + 1 - first) - 1) << first
        return content.to_bytes(nbytes, "little")

    async def _write_bits(self, each: StoredBitmap, start: int, content: bytes) -> None:
        """Put *content*, within a cluster, at byte *start* of the bits in the image; stable after the next sync."""
        index, inside = divmod(start, self._geometry.cluster_size)
        entry = each.table[index]
        if entry == layout.BITMAP_ENTRY_ALL_ONES or (not entry and not any(content)):
            return
        if not entry:
            entry = await self._allocate(each, index)
        await self._stability.write(entry + inside, content)

    async def _allocate(self, each: StoredBitmap, index: int) -> int:
        """A cluster for bits that are all zero: it is stable zeros, so what points at it changes nothing."""
        cluster = await self._allocator.allocate_zeros()
        host_offset = cluster.start << self._geometry.cluster_bits
        async with Rollback(self._reaper.free, cluster):
            await self._root.allow_uncounted()
            where = each.bitmap.record.table_offset + index * ENTRY_SIZE
            await self._stability.write(where, bytes_of([host_offset]))
        each.table[index] = host_offset
        self.owned.append(cluster.start)
        self._mapping.own_metadata(cluster)
        return host_offset

    # -- live, or settled

    async def _begin(self) -> None:
        """Take the bits of all bitmaps that record into memory; those that cannot be kept are given up first."""
        await self.give_up()
        if not self._kept:
            return
        shapes = [self._shape(each) for each in self._kept]
        contents = [await self.read_bits(each) for each in self._kept]
        self._places = await self._share(shapes, contents)
        window = self._log.memory.window(0) if self._places and self._log is not None else None
        if window is None:
            bits = [ffi.new("uint8_t[]", content or b"\0") for content in contents]
        else:
            bits = [window + place for place in self._places]
        self._is_mirrored = bool(self._places) and window is None
        self._live = bits
        self._dirty.begin(self._geometry.size)
        self._record()
        self._hot.clear()
        self._is_live = True

    def _record(self) -> None:
        """From now on changes are noted in the bitmaps that are kept, and in what follows those that are frozen."""
        followers = [each.follower for each in self._frozen.values() if each.follower is not None]
        for follower in followers:
            follower.fit(self._geometry.size)
        granularities = [each.bitmap.record.granularity_bits for each in self._kept]
        self._dirty.record(
            [*granularities, *(follower.granularity_bits for follower in followers)],
            [*self._live, *(follower.bits for follower in followers)],
        )

    # -- frozen

    async def freeze(self, each: StoredBitmap) -> FrozenBitmap:
        """Hold what a bitmap says now, while it records on; nobody has frozen it. Raises: OSError."""
        async with self._turn.hold():
            bits = await self.read_bits(each)
            record, name = each.bitmap.record, each.bitmap.raw_name
            frozen = FrozenBitmap(name, bits, record.granularity_bits, self._geometry.size)
            if each.is_kept:
                frozen.follower = Follower(record.granularity_bits, self._geometry.size)
            self._frozen[name] = frozen
            if self._is_live:
                self._record()
        return frozen

    def is_frozen(self, raw_name: bytes) -> bool:
        """Whether somebody has frozen the bitmap of that name."""
        return raw_name in self._frozen

    def holds(self, frozen: FrozenBitmap) -> bool:
        """Whether *frozen* was frozen here, and is still."""
        return self._frozen.get(frozen.raw_name) is frozen

    def thaw(self, frozen: FrozenBitmap) -> None:
        """Forget what followed; the bitmap itself has it all."""
        del self._frozen[frozen.raw_name]
        if self._is_live:
            self._record()

    def _shape(self, each: StoredBitmap) -> Shape:
        record = each.bitmap.record
        return Shape(record.table_offset, each.nbytes(self._geometry.size), record.granularity_bits)

    async def _share(self, shapes: list[Shape], contents: list[bytes]) -> list[int]:
        """Put the bits where the next process looks for them, and say so in the header; where, or nothing."""
        self._log = self._links.log
        if self._log is None:
            return []
        head = pack_live(shapes)
        found = places(shapes, self._log.live_offset + len(head))
        try:
            is_new = await self._links.begin_log(found[-1])
        except OSError as error:
            self._lacks_memory = True
            log.warning(
                "%s: no shared memory for its bitmaps, to which a kill is a power loss: %s", self._file.path, error
            )
            return []
        if not is_new and found[-1] > self._log.memory_bytes:
            return []
        await Store(self._log.memory, *zip(found, contents, strict=False), (self._log.live_offset, head))
        self._log.has_live = True
        try:
            await self._write_mark()
        except OSError:
            self._log.has_live = False  # or the log, which nobody settles then, could not be followed by another
            raise
        return found[:-1]

    def _wanted_nbytes(self) -> int:
        """How long a log is in whose memory all of that has room: links may want one before a bit is live."""
        if not self._kept or self._lacks_memory or self._links.log is None:
            return 0
        shapes = [self._shape(each) for each in self._kept]
        return places(shapes, self._links.log.live_offset + len(pack_live(shapes)))[-1]

    async def _write_mark(self) -> None:
        """Let the header say where the live bits are, or that none are; nothing to do while links wait."""
        assert self._log is not None
        if self._links.has_waiting:
            return
        if not self._links.policy.has_log:  # then the mark is ours alone, and writing it may take a while
            await self._stability.write(MARK_OFFSET, self._log.idle_mark)
            return
        try:
            await Store(self._log.memory, mark=HeaderMark(self._file, MARK_OFFSET, self._log.idle_mark))
        except OSError as error:
            if not is_harmless(error):
                self._stability.fail(error)
            raise

    async def give_up(self) -> None:
        """Mark those in which nobody can record as worth nothing, stable before the first change."""
        lost = [each for each in self.stored if each.is_kept and each.problem]
        for each in lost:
            where = each.bitmap.host_offset + layout.BITMAP_FLAGS_OFFSET
            flags = layout.BITMAP_FLAGS.pack(each.bitmap.record.flags | BitmapFlags.IN_USE)
            await self._stability.write(where, flags)
        if lost:
            await self._stability.sync()  # until then who changes something gives them up
            for each in lost:
                each.set_record(flags=each.bitmap.record.flags | BitmapFlags.IN_USE)
            self._choose()

    async def read_bits(self, each: StoredBitmap) -> bytes:
        """The bits of a bitmap: the live ones, else what the image holds."""
        if self._is_live and each in self._kept:
            return bytes(self._dirty.load(self._kept.index(each), 0, each.nbytes(self._geometry.size)))
        return await stored_bits(self._file, self._geometry, each)

    async def settle(self) -> None:
        """Let the image hold the exact bits, and none be live; whoever changes something next begins again."""
        async with self._turn.hold():
            if not self._is_live:
                return
            hot = set(self._hot)
            self._dirty.cool(hot)
            self._hot.clear()
            await self._write_zones(hot, set())
            await self._stability.sync()
            if self._places:
                assert self._log is not None
                await Store(self._log.memory, (self._log.live_offset, NONE))
                self._log.has_live = False
                await self._write_mark()
            self._dirty.end()
            self._places, self._live = [], []
            self._is_live = self._is_mirrored = False
            self._links.end_log()
