"""The header of an open image: pointers to tables, switched one sector at a time, and the dirty bit."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

from qcow2.driver.operation import File, Read
from qcow2.engine.rangelock import Mutex
from qcow2.engine.stability import Stability, is_harmless
from qcow2.format import layout
from qcow2.format.header import Extension, Header, rewrite_header, warn_next
from qcow2.format.layout import ExtensionMagic


class BitmapsPlace(NamedTuple):
    """The data of the bitmaps extension, within the first sector, and what it shall be."""

    host_offset: int
    data: bytes


class Root:
    """The one place that changes cluster 0 while the image is open."""

    def __init__(self, header: Header, stability: Stability, *, is_lazy: bool) -> None:
        self.header = header
        self.is_lazy = is_lazy  # refcounts need not be right on the disk, once the dirty bit is stable
        self._nunsound = 0  # changes that are under way or failed: flags or counts on the disk are wrong in another way
        self._is_marked = False  # the dirty bit is stable; an image that has it already is never opened for writing
        self.breakable = layout.PROMISES ^ header.kept_promises
        self.broken_promises = self.breakable  # the autoclear bits that a change breaks
        self.next_bitmaps: BitmapsPlace | None = None  # changes together with the disk's size
        self._stability = stability
        self._mutex = Mutex()
        stability.warn_next = self._warn_next

    @property
    def file(self) -> File:
        """The file of the image."""
        return self._stability.file

    @property
    def has_promises(self) -> bool:
        """Whether the header says what the next change breaks."""
        return bool(self.header.record.autoclear_features & self.broken_promises)

    async def allow_uncounted(self) -> None:
        """Return once references may be linked that the refcounts on the disk do not count (law 4).

        Lazy: the dirty bit is stable then. Accurate: at once, since every cluster is counted before it is handed out.
        """
        if self.is_lazy and not self._is_marked:
            async with self._mutex.hold():
                await self._mark_dirty()

    async def begin_unsound(self) -> None:
        """Return once the dirty bit is stable: until `end_unsound` a death, or a close, leaves the rest to a repair.

        Version 2 has no such bit, and is left to `qcow2 check -r`.
        """
        async with self._mutex.hold():
            if self.header.record.version >= 3:
                await self._mark_dirty()
            self._nunsound += 1

    async def end_unsound(self) -> None:
        """Flags and counts on the disk are right again, unless they are lazy: for each `begin_unsound` that was.

        Where the bit cannot be cleared it is by the next who ends, or closes: that undoes no change.
        """
        self._nunsound -= 1
        if not self.is_lazy:
            with suppress(OSError):
                await self.mark_clean()

    async def void_promises(self) -> None:
        """Clear the autoclear bits that the first change breaks, stable on return.

        One byte: those beside it are the mark of the link log, which has other writers.
        """
        async with self._mutex.hold():
            if self.has_promises:
                word = self.header.record.autoclear_features
                offset = layout.HEADER_AUTOCLEAR_OFFSET + layout.FEATURE_WORD.size - 1
                kept = word ^ (word & self.broken_promises)
                await self._stability.write(offset, bytes([kept & layout.PROMISES]))
                await self._stability.sync()  # if it is not tried who comes next writes that again
                self._note(autoclear_features=kept)

    async def mark_clean(self) -> None:
        """Clear the dirty bit, if it is set and nothing unsound; stable on return, everything else is so already."""
        async with self._mutex.hold():
            if self.header.is_dirty and not self._nunsound:
                word = self.header.record.incompatible_features
                word ^= word & int(layout.Incompatible.DIRTY)
                packed = layout.FEATURE_WORD.pack(word)
                await self._write(layout.HEADER_INCOMPATIBLE_OFFSET, packed, incompatible_features=word)
                self._is_marked = False

    async def _warn_next(self) -> None:
        """As `warn_next`."""
        await warn_next(self.file)

    async def mark_corrupt(self) -> None:
        """Set the corrupt bit, stable on return: nobody writes before a repair. Version 2 has no place for it."""
        async with self._mutex.hold():
            if self.header.record.version >= 3:
                await self._mark(layout.Incompatible.CORRUPT)

    async def _mark(self, bit: layout.Incompatible) -> None:
        """Set *bit*. Eight bytes inside one sector: a power loss leaves the old or the new bits."""
        word = self.header.record.incompatible_features | int(bit)
        await self._stability.write(layout.HEADER_INCOMPATIBLE_OFFSET, layout.FEATURE_WORD.pack(word))
        self._note(incompatible_features=word)  # so a close clears it, whether it is stable or not
        await self._stability.sync()

    async def _mark_dirty(self) -> None:
        """Return once the dirty bit is stable; if a sync is not tried who comes next sets it again."""
        if not self._is_marked:
            await self._mark(layout.Incompatible.DIRTY)
            self._is_marked = True

    def _note(self, **fields: int) -> None:
        self.header = replace(self.header, record=replace(self.header.record, **fields))

    async def set_refcount_table(self, host_offset: int, nclusters: int) -> None:
        """Let the header point at another refcount table, which is stable; stable on return."""
        packed = layout.HEADER_REFCOUNT_TABLE.pack(host_offset, nclusters)
        fields = {"refcount_table_offset": host_offset, "refcount_table_clusters": nclusters}
        async with self._mutex.hold():  # the table grows whenever it has to, also while the disk does
            await self._write(layout.HEADER_REFCOUNT_TABLE_OFFSET, packed, **fields)

    async def set_l1(self, host_offset: int, nentries: int) -> None:
        """Let the header point at another L1 table, which is stable; stable on return."""
        packed = layout.HEADER_L1.pack(nentries, host_offset)
        await self._write(layout.HEADER_L1_OFFSET, packed, l1_size=nentries, l1_table_offset=host_offset)

    async def set_disk(self, size: int, host_offset: int, nentries: int) -> None:
        """Let the disk be *size* bytes long and another L1 table, which is stable, map it; stable on return."""
        packed = layout.HEADER_DISK.pack(size, self.header.record.crypt_method, nentries, host_offset)
        await self._write_disk(packed, size=size, l1_size=nentries, l1_table_offset=host_offset)

    async def set_snapshots(self, nsnapshots: int, host_offset: int) -> None:
        """Let the header point at another snapshot table, which is stable; stable on return."""
        packed = layout.HEADER_SNAPSHOTS.pack(nsnapshots, host_offset)
        await self._write(layout.HEADER_SNAPSHOTS_OFFSET, packed, nb_snapshots=nsnapshots, snapshots_offset=host_offset)

    async def set_size(self, nbytes: int) -> None:
        """Let the disk be *nbytes* long, which its L1 table maps; stable on return."""
        await self._write_disk(layout.HEADER_SIZE.pack(nbytes), size=nbytes)

    async def _write_disk(self, packed: bytes, **fields: int) -> None:
        """Write what begins with the size of the disk, and in the same write where the bitmaps are that fit it."""
        assert layout.HEADER_DISK_OFFSET == layout.HEADER_SIZE_OFFSET
        place = self.next_bitmaps
        async with self._mutex.hold():  # what lies between is written as it was
            if place is not None:
                start = layout.HEADER_SIZE_OFFSET + len(packed)
                packed += await Read(self.file, start, place.host_offset - start) + place.data
            await self._write(layout.HEADER_SIZE_OFFSET, packed, **fields)
        if place is not None:
            changed = [
                Extension(each.magic, place.data) if each.magic == ExtensionMagic.BITMAPS else each
                for each in self.header.extensions
            ]
            self.header = replace(self.header, extensions=tuple(changed))
            self.next_bitmaps = None

    async def set_autoclear(self, bit: int, *, on: bool) -> None:
        """Set or clear one of the autoclear bits beside the mark, stable on return."""
        word = self.header.record.autoclear_features
        changed = word | bit if on else word ^ (word & bit)
        if changed != word:
            offset = layout.HEADER_AUTOCLEAR_OFFSET + layout.FEATURE_WORD.size - 1
            await self._write(offset, bytes([changed & layout.PROMISES]), autoclear_features=changed)

    async def rewrite(self, change: Callable[[Header], Header]) -> None:
        """Let the first cluster say what *change* makes of the header, and the mark what it does; stable on return.

        No link waits and no bits are live; but the mark may name the log of what is below, and the refcount table
        may move until we have the mutex.
        Raises: OSError; if a lack of space let it say what it did, the image may be written on.
        """
        self._stability.require_trust()
        async with self._mutex.hold():
            header = change(self.header)
            before = (await Read(self.file, 0, header.cluster_size)).rstrip(b"\0")
            try:
                self.header = await rewrite_header(self.file, _marked(header, before))
            except OSError as error:
                if not (is_harmless(error) and await self._begins_with(before)):
                    await self._stability.lose(error)  # nobody knows which header stands there
                raise

    async def _begins_with(self, content: bytes) -> bool:
        """Whether the file does; behind that may be what no header leads to."""
        try:
            return bool(await Read(self.file, 0, len(content)) == content)
        except OSError:
            return False

    async def _write(self, host_offset: int, packed: bytes, **fields: int) -> None:
        """Write *packed*, which says *fields*; stable on return.

        Raises: OSError; once it is written nobody may go on by the old header, whatever the sync lacked.
        """
        await self._stability.write(host_offset, packed)
        try:
            await self._stability.sync()
        except OSError as error:
            self._stability.fail(error)
            raise
        self._note(**fields)


class Unsound:
    """Whether a change has made flags or counts on the disk wrong; without an `end` they are left to a repair."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._is_on = False

    async def begin(self) -> None:
        """They are wrong from now on."""
        await self._root.begin_unsound()
        self._is_on = True

    async def end(self) -> None:
        """They are right again, if they were wrong."""
        if self._is_on:
            self._is_on = False
            await self._root.end_unsound()


def _marked(header: Header, content: bytes) -> Header:
    """*header* with the mark that *content*, which the image begins with, has: the log changes it, and tells nobody."""
    at = layout.HEADER_AUTOCLEAR_OFFSET
    (word,) = layout.FEATURE_WORD.unpack(
        content[at : at + layout.FEATURE_WORD.size].ljust(layout.FEATURE_WORD.size, b"\0")
    )
    kept = word ^ (word & layout.PROMISES) | header.record.autoclear_features & layout.PROMISES
    return replace(header, record=replace(header.record, autoclear_features=kept))
