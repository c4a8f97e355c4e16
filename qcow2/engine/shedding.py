"""Letting go of all that an image maps from some guest offset on; and with that a shorter disk.

Each entry that goes shows what is below, whichever others have gone: so no order among them matters. What they led to
is free once it is stable that they do not (law 5). When an overlay is emptied its backing file holds the same bytes,
stable. When a disk is shortened nobody looks past its end: its size goes first, in one write. What a death leaves
mapped there goes when the disk is shortened again, be it to the same size.
"""

from array import array

from qcow2.driver.operation import File, Resize, Size
from qcow2.engine.bitmapheader import require_size
from qcow2.engine.data import find_untouched
from qcow2.engine.links import Links
from qcow2.engine.opened import Opened
from qcow2.engine.part import Part
from qcow2.engine.rollback import Rollback
from qcow2.engine.root import Root
from qcow2.engine.snapshots import Snapshots
from qcow2.engine.space import Space
from qcow2.engine.zeroing import Zeroer
from qcow2.error import UnsupportedImage
from qcow2.format.geometry import whole_sectors
from qcow2.format.header import Header
from qcow2.format.layout import ENTRY_SIZE
from qcow2.plane.entry import l1_shared, l1_table
from qcow2.plane.l2cache import Kind
from qcow2.plane.tally import Tally


def shrunk_size(file: File, header: Header, nbytes: int) -> int:
    """*nbytes* rounded up to a sector, if the disk of *file* may shrink to it.

    Raises: ValueError for a size that it cannot have; UnsupportedImage for content that cannot shrink with it.
    """
    record = header.record
    size = whole_sectors(file.path, nbytes)
    if size > record.size:
        raise ValueError(f"{file.path}: size {nbytes} is not from 0 to {record.size}, the disk cannot shrink to it")
    if record.nb_snapshots and record.version < 3:
        message = f"{record.nb_snapshots} internal snapshots in an image of version 2: it cannot be resized"
        raise UnsupportedImage(file.path, message)
    require_size(file, header, size)
    return size


class Shedder(Part):
    """Takes mappings away from one image, while nothing else is under way."""

    def __init__(
        self, opened: Opened, root: Root, space: Space, links: Links, zeroer: Zeroer, snapshots: Snapshots
    ) -> None:
        super().__init__(opened, root, space)
        self._zeroer = zeroer
        self._links = links
        self._snapshots = snapshots

    async def shrink(self, nbytes: int) -> None:
        """Let the disk be *nbytes* long, as `shrunk_size` said; stable on return. A death leaves the old or the new.

        What is cut off is gone: also from the last cluster, so that growing again, with whatever program, shows zeros.
        So is what a shrink that did not come to its end has left, past the end of a disk that is so short already.
        Raises: OSError; the disk may be shorter then, and what it had past its end still be there.
        """
        if nbytes != self._geometry.size:
            await self._root.set_size(nbytes)
        end = self._geometry.round_up(nbytes)
        try:
            self._look_at(max(self._geometry.size, len(self._mapping.l1) << self._geometry.table_bits))
            await self.shed(end)
            await self._clear_rest(nbytes, min(end, self._geometry.size))
            await self._links.commit()
            if self._geometry.has_data_file:
                await self._cut_data_file(nbytes)
        finally:
            self._look_at(nbytes)
        await self._stability.sync()
        if self._mapping.cache.untouched is not None:
            self._mapping.cache.set_untouched(await find_untouched(self._data, self._geometry))

    def _look_at(self, nbytes: int) -> None:
        """Let the disk be *nbytes* long for all that is done from now on, whatever the header says."""
        self._geometry.size = nbytes
        self._mapping.cache.resize()

    async def _cut_data_file(self, nbytes: int) -> None:
        """Let the external data file be no longer than the disk; what is encrypted ends with a cluster of zeros."""
        end = self._geometry.round_up(nbytes) if self._ends_whole else nbytes
        if await Size(self._data.file) > end:
            await Resize(self._data.file, end)

    async def _clear_rest(self, guest_offset: int, end: int) -> None:
        """Zeros in the rest of a cluster, if it is the image's own."""
        if guest_offset < end:
            run = await self._mapping.resolve(guest_offset, end - guest_offset)
            if self._geometry.has_subclusters or run.kind in (Kind.DATA, Kind.COMPRESSED):
                await self._zeroer.write_zeroes(guest_offset, end - guest_offset, unmap=False)

    async def shed(self, guest_offset: int) -> None:
        """Let nothing be mapped from *guest_offset*, the start of a cluster, on; stable on return.

        Raises: OSError, CorruptImage; then some of it may be mapped still.
        """
        first = -(-guest_offset >> self._geometry.table_bits)
        await self._zeroer.uncover(guest_offset, min(first << self._geometry.table_bits, self._geometry.size))
        await self._drop_tables(first)
        await self._allocator.cut_off()

    async def _drop_tables(self, first: int) -> None:
        """Let the L1 entries from index *first* on be empty, and what they led to free."""
        l1 = self._mapping.l1
        dropped = array("Q", bytes(first * ENTRY_SIZE)) + l1_shared(l1[first:])
        if not any(dropped):
            return
        tree = await self._snapshots.count(dropped)
        async with Rollback(self._let_go_of_some, dropped):
            await self._mapping.change_l1(l1[:first] + array("Q", bytes(len(l1[first:]) * ENTRY_SIZE)))
        await self._let_go(dropped, tree)

    async def _let_go_of_some(self, dropped: "array[int]") -> None:
        """Free what those of the L1 entries *dropped* led to that are empty by now; the file has the others still."""
        if self._stability.error is None:
            gone = array("Q", (0 if still else entry for entry, still in zip(dropped, self._mapping.l1, strict=True)))
            await self._let_go(gone, await self._snapshots.count(gone))

    async def _let_go(self, dropped: "array[int]", tree: Tally) -> None:
        """Free what the L1 entries *dropped* led to, which *tree* counts."""
        bits = self._geometry.cluster_bits
        self._mapping.disown_metadata([l1_table(entry) >> bits for entry in dropped if l1_table(entry)])
        await self._snapshots.let_go(tree)
