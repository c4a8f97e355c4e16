"""An image while it is written: what may run side by side, each request of a guest among it."""

import errno
from array import array
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from qcow2.driver.operation import Buffer, File
from qcow2.engine.backing import Backing
from qcow2.engine.compressed import level_of
from qcow2.engine.data import Data
from qcow2.engine.opened import OpenOptions
from qcow2.engine.readable import ReadableImage
from qcow2.error import UnsupportedImage
from qcow2.format.geometry import require_inside
from qcow2.format.header import Header
from qcow2.format.layout import Autoclear, Incompatible

if TYPE_CHECKING:
    from qcow2.engine.changes import Changes
    from qcow2.engine.linkpolicy import LinkPolicy


class WritableImage(ReadableImage):
    """What a `ReadableImage` can do, and change. Its coroutines may run side by side; the same scheduler runs all.

    A range outside the disk is its caller's mistake, and ends in a ValueError before anything has changed.
    """

    def __init__(
        self, file: File, data: Data, header: Header, l1: "array[int]", backing: Backing | None, options: OpenOptions
    ) -> None:
        super().__init__(file, data, header, l1, backing, options)
        self.read_only = not options.writable
        self.on_bitmaps_void: Callable[[], None] = lambda: None  # told once, at the first change of a disk with bitmaps
        self.bitmap_problems: list[str] = []  # why some bitmaps cannot be kept, once it is open for writing
        self._told_void = False
        self._changes: Changes | None = None  # only while writable

    @property
    def header(self) -> Header:
        """The header as it is on the disk."""
        return self._changes.root.header if self._changes else self._header

    def set_link_policy(self, policy: "LinkPolicy") -> None:
        """Say when links may wait, and who is told about it; at first they may always."""
        if self._changes is not None:
            self._changes.links.set_policy(policy)

    def _writable(self) -> "Changes":
        if self._changes is None:
            raise OSError(errno.EROFS, "opened read-only", self.file.path)
        self._changes.require_trust()
        return self._changes

    def _may_overwrite(self) -> bool:
        """Whether the extent map may answer writes: not before the first change has seen to what must come before."""
        return self._changes is not None and self._changes.may_overwrite and self._stability.error is None

    async def _changing(self) -> "Changes":
        changes = self._writable()
        if changes.root.has_promises:
            breaks = changes.root.header.record.autoclear_features & changes.root.broken_promises
            await changes.guard(changes.root.void_promises())
            changes.require_trust()
            self._cache.set_file(self._slot, writable=self._may_overwrite())
            if breaks & Autoclear.BITMAPS and not self._told_void:
                self._told_void = True
                self.on_bitmaps_void()
        if changes.uncounted.is_due:
            await changes.guard(changes.uncounted.look_if_cheap())
            changes.require_trust()
            self._cache.set_file(self._slot, writable=self._may_overwrite())
        return changes

    async def write(self, guest_offset: int, source: Buffer) -> None:
        """Put *source*, which lies inside the disk, at *guest_offset*; process-safe on return, stable after `flush`.

        Raises: OSError, CorruptImage; then nothing, a part or all of it is written.
        """
        require_inside(self.geometry.size, guest_offset, len(source))
        changes = await self._changing()
        await changes.guard(changes.bitmaps.mark(guest_offset, len(source)))
        await changes.guard(changes.writer.write(guest_offset, source))

    def require_compressible(self) -> None:
        """Raises: UnsupportedImage if it can have no compressed clusters."""
        if self._data.is_encrypted or self.header.record.incompatible_features & Incompatible.EXTERNAL_DATA:
            raise UnsupportedImage(self.file.path, "no compressed clusters if it is encrypted or has a data file")

    async def write_compressed(self, guest_offset: int, source: memoryview, level: int | None = None) -> None:
        """As `write`, of whole clusters, the disk's last one as long as it is; those that become smaller compressed.

        Raises: ValueError, UnsupportedImage; OSError, CorruptImage; then nothing, a part or all of it is written.
        """
        level = self._require_packable(guest_offset, len(source), level)
        changes = await self._changing()
        await changes.guard(changes.bitmaps.mark(guest_offset, len(source)))
        await changes.guard(changes.packer.write(guest_offset, source, level))

    async def fetch_compressed(self, guest_offset: int, source: memoryview) -> None:
        """The same for what the disk shows there already, while nobody else writes: no bitmap knows."""
        level = self._require_packable(guest_offset, len(source), None)
        changes = await self._changing()
        await changes.guard(changes.packer.write(guest_offset, source, level))

    def _require_packable(self, guest_offset: int, nbytes: int, level: int | None) -> int:
        """The level to compress with. Raises: as `write_compressed`."""
        require_inside(self.geometry.size, guest_offset, nbytes)
        self.require_compressible()
        end, size = guest_offset + nbytes, self.geometry.cluster_size
        if guest_offset % size or (end % size and end != self.size):
            raise ValueError(f"{nbytes} bytes at {guest_offset} are not whole clusters of {size} bytes")
        return level_of(self.header.compression_type, level)

    async def fetch(self, guest_offset: int, nbytes: int, content: memoryview | None = None) -> None:
        """Let the image itself have *content*, what shows through it in the range, or zeros if that is what does.

        Where it has anything, also what was written meanwhile, that stays: the disk is the same, so no bitmap knows.
        Raises: OSError, CorruptImage; then a part of it is the image's.
        """
        require_inside(self.geometry.size, guest_offset, nbytes)
        changes = await self._changing()
        await changes.guard(changes.fetcher.fetch(guest_offset, nbytes, content))

    async def write_zeroes(self, guest_offset: int, nbytes: int, *, unmap: bool) -> None:
        """Make the range read as zeros; *unmap* lets go of the host clusters that it covers, else they are kept."""
        require_inside(self.geometry.size, guest_offset, nbytes)
        changes = await self._changing()
        await changes.guard(changes.bitmaps.mark(guest_offset, nbytes))
        await changes.guard(changes.zeroer.write_zeroes(guest_offset, nbytes, unmap=unmap))

    async def discard(self, guest_offset: int, nbytes: int) -> None:
        """Let go of the host clusters that the range covers, which then read as zeros; the rest stays as it is."""
        require_inside(self.geometry.size, guest_offset, nbytes)
        changes = await self._changing()
        await changes.guard(changes.bitmaps.mark(guest_offset, nbytes))
        await changes.guard(changes.zeroer.discard(guest_offset, nbytes))

    async def flush(self) -> None:
        """Make every write that has completed stable."""
        if self._changes is not None:
            await self._changes.guard(self._changes.links.flush())

    async def settle(self) -> None:
        """Let the file alone hold all that has completed: no link waits after, and no bits are live."""
        if self._changes is not None:
            await self._changes.guard(self._changes.links.commit())
            await self._changes.guard(self._changes.bitmaps.settle())

    @property
    def has_waiting_links(self) -> bool:
        """Whether a sync alone would not make all stable that has completed."""
        return self._changes is not None and self._changes.links.has_waiting

    @property
    def lets_links_wait(self) -> bool:
        """Whether what it writes over something else may wait in a link log."""
        return self._changes is not None and self._changes.links.may_wait

    async def begin_log(self) -> None:
        """Have a link log before a link wants to wait, if one is to be had."""
        changes = self._writable()
        await changes.guard(changes.links.begin_early())

    async def lie_over(self, below: "WritableImage") -> bool:
        """See to it that links of *below*, which is under this image, may wait on: a kill loses none. Process-safe.

        False: they may not, `bring_links` must come first. Nothing is under way.
        Raises: OSError; then it is as it was, or takes no more writes.
        """
        changes, log = self._writable(), below._writable().links.log
        if not below.has_waiting_links or log is None:
            return True
        return await changes.guard(changes.links.name_below(log.tag))

    async def forget_below(self) -> None:
        """No link of what is below waits any more, which is stable. Raises: OSError, as `lie_over`."""
        changes = self._writable()
        await changes.guard(changes.links.name_below(0))

    async def bring_links(self) -> None:
        """Let the file alone hold the disk: no link waits after. Process-safe, and perhaps not stable.

        Raises: OSError, also if the image takes no more writes.
        """
        changes = self._writable()
        await changes.guard(changes.links.commit())
        self._writable()

    async def make_ready(self) -> None:
        """Do now, stable on return, what the first write would wait for. Raises: OSError, CorruptImage."""
        changes = await self._changing()
        await changes.guard(changes.make_ready())

    async def make_tables(self, used: Iterable[range]) -> None:
        """Have L2 tables for parts of the disk that will be written to soon, as far as they take little space.

        As `make_ready` it spares the first writes the time. Raises: OSError, CorruptImage.
        """
        changes = await self._changing()
        await changes.guard(changes.tables.require_some(used))

    async def _alone(self) -> "Changes":
        """What changes the image; no link waits, and nobody else is about to change anything."""
        changes = await self._changing()
        await changes.guard(changes.links.commit())
        return changes
