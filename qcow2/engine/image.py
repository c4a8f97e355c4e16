"""The image: what people use. Coroutines that reach the disk only through `qcow2.driver.operation`.

What changes images is imported by the first one that is opened for writing: who only reads starts sooner.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from qcow2.driver.operation import File, Read, Resize, Size
from qcow2.engine.backing import Backing
from qcow2.engine.encryption import open_data
from qcow2.engine.opened import OpenOptions
from qcow2.engine.opening import open_header
from qcow2.engine.writable import WritableImage
from qcow2.error import BitmapError, UnsupportedImage
from qcow2.format.geometry import Geometry
from qcow2.format.header import Header, header_over, read_header
from qcow2.format.layout import ENTRY_SIZE
from qcow2.format.snapshot import Snapshot, find_snapshot, read_snapshots, require_possible, require_sizes
from qcow2.plane.entry import words_of

if TYPE_CHECKING:
    from qcow2.engine.bitmapdirectory import Change
    from qcow2.engine.bitmapplan import BitmapPlan
    from qcow2.engine.bitmaptable import StoredBitmap
    from qcow2.engine.frozenbitmap import FrozenBitmap
    from qcow2.plane.linklog import LinkLog


class Image(WritableImage):
    """An open qcow2 image. Its coroutines may run side by side on one scheduler; nothing else may touch it."""

    @classmethod
    async def open(
        cls,
        file: File,
        *,
        backing: "Backing | None" = None,
        data_file: File | None = None,
        options: OpenOptions | None = None,
        log: "LinkLog | None" = None,
        header: Header | None = None,
    ) -> "Image":
        """Open the image in *file*, already locked, over *backing*, already open; its data may be in *data_file*.

        For writing it must not be dirty: repair it first. Links may wait in *log*, if it is given, until `flush`.
        Of a new image that has no magic yet *header* is what it says.
        Raises: UnsupportedImage, CorruptImage.
        """
        options = options or OpenOptions()
        if header is None:
            header = await open_header(file, options, has_data_file=data_file is not None)
        data = await open_data(file, header, options.keys, has_data=options.has_data, data_file=data_file)
        record = header.record
        l1 = words_of(await Read(file, record.l1_table_offset, record.l1_size * ENTRY_SIZE))
        image = cls(file, data, header, l1, backing, options)
        file_size = await Size(file)
        if file_size < record.l1_end:  # an empty end of the L1 table was cut off; nothing may be put in its place
            if options.writable:
                await Resize(file, record.l1_end)
            file_size = record.l1_end
        image._mapping.set_file_end(file_size)
        if options.writable:
            from qcow2.engine.openchanges import open_changes

            image._changes = changes = await open_changes(image._opened, header, file_size, options, log)
            image.bitmap_problems = changes.bitmaps.problems
        return image

    async def grow(self, nbytes: int) -> None:
        """Let the disk be *nbytes* long, rounded up to a sector; what is new reads as zeros. Stable on return.

        Nothing else is under way. A death at any moment leaves the old disk or the new one.
        Raises: ValueError, UnsupportedImage; OSError, then the disk goes on as it was.
        """
        changes = await self._alone()
        size = await self.grown_size(nbytes)
        await changes.guard(changes.fitting.change(size, changes.grower.grow(size)))

    async def grown_size(self, nbytes: int) -> int:
        """*nbytes* rounded up to a sector, if `grow` would not refuse it. Raises: ValueError, UnsupportedImage."""
        from qcow2.engine.growth import grown_size

        size = grown_size(self.file, self.header, nbytes)
        if size != self.size:
            require_sizes(self.file.path, (await self._alone()).snapshots.table)
        return size

    async def shrink(self, nbytes: int) -> None:
        """Let the disk be *nbytes* long, rounded up to a sector; what is past that is gone. Stable on return.

        Nothing else is under way. A death at any moment leaves the old disk or the new one.
        Raises: ValueError, UnsupportedImage, CorruptImage; OSError, then the disk may be the new one.
        """
        from qcow2.engine.shedding import shrunk_size

        changes = await self._alone()
        size = shrunk_size(self.file, self.header, nbytes)
        if size != self.size:
            require_sizes(self.file.path, changes.snapshots.table)
        await changes.guard(changes.fitting.change(size, changes.shedder.shrink(size)))

    async def preallocate(self, guest_offset: int, nbytes: int, *, writes: bool) -> None:
        """Give each cluster of the range that holds nothing a place, which is zeros; *writes* writes them, too.

        `grow` has added the range. Nothing else is under way. Raises: OSError, CorruptImage; then a part has one.
        """
        changes = await self._alone()
        await changes.guard(changes.writer.preallocate(guest_offset, nbytes, writes=writes))

    async def expand_zeros(self, on_step: Callable[[], None] = lambda: None) -> None:
        """Let nothing say zeros that version 2 cannot say so; the disk is as it was. Nothing else is under way.

        *on_step()*, called now and then, may raise: some are said otherwise then.
        Raises: OSError, CorruptImage; UnsupportedImage if a snapshot says so, which is left as it is.
        """
        from qcow2.engine.expansion import expand_zeros, has_zero_flags

        await self.require_expandable()
        changes = await self._alone()
        await changes.guard(expand_zeros(self._opened, changes.writer, changes.zeroer, on_step))
        await changes.guard(changes.links.commit())
        if await has_zero_flags(self.file, self.geometry, self._mapping.l1):
            raise UnsupportedImage(self.file.path, "there are zero clusters past the end of the disk")

    async def require_expandable(self) -> None:
        """Raises: UnsupportedImage if a snapshot says zeros as version 2 cannot; CorruptImage, OSError."""
        from qcow2.engine.expansion import has_zero_flags

        for snapshot in await self.snapshots():
            require_possible(self.file.path, snapshot, self.header.record)
            record = snapshot.record
            l1 = words_of(await Read(self.file, record.l1_table_offset, record.l1_size * ENTRY_SIZE))
            if await has_zero_flags(self.file, self.geometry, l1):
                message = f"snapshot {snapshot.name!r} has zero clusters, which version 2 does not know"
                raise UnsupportedImage(self.file.path, message)

    async def empty(self) -> None:
        """Let what is below show everywhere: the same bytes as now, says the caller, and stable. Stable on return.

        Nothing else is under way. Raises: OSError, CorruptImage; then some clusters are here still.
        """
        changes = await self._alone()
        await changes.guard(changes.shedder.shed(0))

    async def put_over(self, backing: "Backing | None", name: str | None, backing_format: str | None) -> None:
        """Let *backing*, open, show through, and the header say so by *name*; stable on return.

        Nothing else is under way. The disk is the same over it, says the caller: what that takes is stable first.
        Raises: UnsupportedImage, before anything has changed; OSError, then nobody knows which one the header names.
        """
        self.refuse_snapshots()
        changes = await self._alone()
        header_over(self.file, changes.root.header, name, backing_format)  # which refuses what does not fit
        await changes.guard(changes.bitmaps.settle())
        await changes.guard(changes.links.flush())
        await changes.guard(changes.root.rewrite(lambda header: header_over(self.file, header, name, backing_format)))
        self.show_below(backing)

    def show_below(self, backing: "Backing | None") -> None:
        """Let *backing* show through from now on; the header says what it says. Nothing is under way."""
        self.backing = backing
        self._reader.backing = backing
        if backing is None:
            self._cache.clear_backing()
        else:
            self._cache.set_backing(backing.extent_map, backing.size, backing)

    def refuse_snapshots(self) -> None:
        """Internal snapshots show what is below, too, and nothing is fetched for them. Raises: UnsupportedImage."""
        if count := self.header.record.nb_snapshots:
            message = f"{count} internal snapshots would show another disk: delete them first"
            raise UnsupportedImage(self.file.path, message)

    async def snapshots(self) -> tuple[Snapshot, ...]:
        """The internal snapshots, in the order of their table. Raises: UnsupportedImage, CorruptImage, OSError."""
        table = self._changes.snapshots.table if self._changes else await read_snapshots(self.file, self._header)
        return table.snapshots

    async def create_snapshot(self, name: str, date_ns: int) -> Snapshot:
        """Keep what the disk holds as the internal snapshot *name*, made *date_ns* ns after 1970; stable on return.

        Nothing else is under way. A death at any moment leaves the old snapshots or the new one besides.
        Raises: ValueError, UnsupportedImage, CorruptImage; OSError, EINVAL if the refcounts are too narrow.
        """
        if self.geometry.has_data_file:
            raise UnsupportedImage(self.file.path, "a disk in an external data file has no internal snapshots")
        changes = await self._alone()
        return await changes.guard(changes.snapshots.create(name, date_ns))

    async def apply_snapshot(self, wanted: str) -> None:
        """Go back to the internal snapshot of the id, or else the name, *wanted*; stable on return.

        Nothing else is under way. The disk is as long as it was then. A death leaves the old disk or the new one.
        Raises: FileNotFoundError, UnsupportedImage, CorruptImage, OSError.
        """
        changes = await self._alone()
        snapshot = find_snapshot(self.file.path, changes.snapshots.table, wanted)
        change = changes.snapshots.apply(snapshot)
        await changes.guard(changes.fitting.change(snapshot.disk_size, change, all_dirty=True))

    async def delete_snapshot(self, name: str) -> None:
        """Forget the internal snapshot *name*, of several the first; what it alone held is free. Stable on return.

        Nothing else is under way. Raises: FileNotFoundError, CorruptImage, OSError.
        """
        changes = await self._alone()
        snapshot = find_snapshot(self.file.path, changes.snapshots.table, name, by_id=False)
        await changes.guard(changes.snapshots.delete(snapshot))

    async def bitmaps(self) -> "list[StoredBitmap]":
        """The persistent bitmaps, in the order of their directory. Raises: CorruptImage, OSError.

        They are of the disk as it is now, also where the image is open as a snapshot.
        """
        if self._changes is not None:
            return self._changes.bitmaps.stored
        from qcow2.engine.bitmaptable import load_bitmaps

        header = await read_header(self.file)
        stored, _ = await load_bitmaps(self.file, header, Geometry.of(header.record), lambda cluster: False)
        return stored

    async def bitmapped_size(self) -> int:
        """Length of the disk that the bitmaps are of; that of a snapshot may be another. Raises: OSError."""
        return (await self._bitmapped()).size

    async def _bitmapped(self) -> Geometry:
        return self.geometry if self._changes is not None else Geometry.of((await read_header(self.file)).record)

    async def bitmap_bits(self, stored: "StoredBitmap") -> bytes:
        """The bits of one of `bitmaps`, as of now; bit n is bit n % 8 of byte n // 8. Raises: OSError."""
        if self._changes is not None:
            return await self._changes.bitmaps.read_bits(stored)
        from qcow2.engine.bitmaptable import stored_bits

        return await stored_bits(self.file, await self._bitmapped(), stored)

    async def change_bitmaps(self, change: "Change") -> None:
        """Let *change* plan which bitmaps there are, and then have them; stable on return. Nothing else is under way.

        A death leaves what was, or all that was planned.
        Raises: BitmapError, UnsupportedImage, CorruptImage, OSError; then they are as before, or nobody knows which
        they are, and the image takes no more writes.
        """
        changes = await self._alone()
        await changes.guard(changes.bitmaps.settle())
        changes.links.end_log()  # which has no room for their bits if it was begun without
        await changes.guard(changes.bitmap_directory.change(change))

    async def freeze_bitmap(self, name: str) -> "FrozenBitmap":
        """Hold what a bitmap says now, while it records on; of one moment, if no request is under way.

        Nobody removes, clears or merges into it before `thaw_bitmap`. A death, or `close`, thaws it as not copied.
        Raises: BitmapError, OSError.
        """
        from qcow2.engine.bitmapplan import BitmapPlan

        changes = self._writable()
        return await changes.bitmaps.freeze(BitmapPlan(self.geometry, changes.bitmaps).find_stored(name))

    def is_frozen_bitmap(self, stored: "StoredBitmap") -> bool:
        """Whether one of `bitmaps` is frozen."""
        return self._changes is not None and self._changes.bitmaps.is_frozen(stored.bitmap.raw_name)

    async def thaw_bitmap(self, frozen: "FrozenBitmap", *, is_copied: bool) -> None:
        """Let a bitmap say what has changed since it was frozen, if what it said *is_copied*; else that, too.

        Stable on return. If it is copied nothing else is under way.
        Raises: BitmapError if the image was closed since; OSError, after which it is as not copied, unless the image
        takes no more writes: then nobody knows.
        """
        bitmaps = self._writable().bitmaps
        if not bitmaps.holds(frozen):
            if is_copied:
                raise BitmapError(f"Bitmap '{frozen.name}' is not frozen any more")
            return

        async def keep_since(plan: "BitmapPlan") -> None:
            plan.replace_bits(frozen.raw_name, frozen.since(self.size))

        try:
            if is_copied:
                await self.change_bitmaps(keep_since)
        finally:
            bitmaps.thaw(frozen)

    async def close(self) -> None:
        """Leave the image clean: refcounts written, everything stable, then the dirty bit cleared.

        Nothing else is under way. Raises: OSError if that fails, or a metadata write or sync has failed before; the
        dirty bit then stays.
        """
        if self._changes is not None:
            await self._changes.guard(self._changes.close())
