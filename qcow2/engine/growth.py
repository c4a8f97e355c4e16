"""Growing the disk: a longer L1 table where the old one is too short, zeros where something would show, then the size.

A death between these steps leaves the old disk: a longer table maps it as well, and nobody looks past its size.
"""

from array import array

from qcow2.driver.operation import File, Resize, Size
from qcow2.engine.links import Links
from qcow2.engine.opened import Opened
from qcow2.engine.part import Part
from qcow2.engine.rollback import Rollback
from qcow2.engine.root import Root
from qcow2.engine.space import Space
from qcow2.engine.write import Writer
from qcow2.engine.zeroing import Zeroer
from qcow2.error import UnsupportedImage
from qcow2.format.geometry import Geometry, whole_sectors
from qcow2.format.header import Header
from qcow2.format.layout import ENTRY_SIZE, MAX_L1_BYTES
from qcow2.format.refusal import l1_entries
from qcow2.plane.entry import bytes_of
from qcow2.plane.untouched import Untouched


def grown_size(file: File, header: Header, nbytes: int) -> int:
    """*nbytes* rounded up to a sector, if the disk of *file* may grow to it.

    Raises: ValueError for a size that it cannot have; UnsupportedImage for content that cannot grow with it.
    """
    record = header.record
    size = whole_sectors(file.path, nbytes)
    old_size = Geometry.of(record).size
    if size < old_size:
        raise ValueError(f"{file.path}: size {nbytes} is less than the disk has, {old_size}; it can only grow")
    table_bytes = l1_entries(size, record.cluster_bits, record.entry_size) * ENTRY_SIZE
    if table_bytes > MAX_L1_BYTES:
        message = f"size {nbytes} needs an L1 table of {table_bytes} bytes, limit {MAX_L1_BYTES}"
        raise ValueError(f"{file.path}: {message} with clusters of {header.cluster_size} bytes")
    if record.nb_snapshots and record.version < 3:
        message = f"{record.nb_snapshots} internal snapshots in an image of version 2: it cannot be resized"
        raise UnsupportedImage(file.path, message)
    return size


class Grower(Part):
    """Makes the disk of one image longer, while nothing else is under way."""

    def __init__(self, opened: Opened, root: Root, space: Space, links: Links, zeroer: Zeroer, writer: Writer) -> None:
        super().__init__(opened, root, space)
        self._is_raw = root.header.record.has_raw_data
        self._links = links
        self._zeroer = zeroer
        self._writer = writer

    async def grow(self, nbytes: int) -> None:
        """Let the disk be *nbytes* long, as `grown_size` said; stable on return.

        Raises: OSError; the size is as before then, if no sync has failed.
        """
        old_size = self._geometry.size
        if nbytes == old_size:
            return
        # What the old tables map past the old end, or the backing file holds there, must not show.
        below = self._reader.backing
        reach = max(0 if below is None else below.size, len(self._mapping.l1) << self._geometry.table_bits)
        if self._is_raw and self._data.is_encrypted:  # no hole is zeros
            reach = nbytes
        await self._require_l1(l1_entries(nbytes, self._geometry.cluster_bits, self._geometry.entry_size))
        if self._geometry.has_data_file:
            await self._lengthen_data_file(old_size, nbytes)
        self._geometry.size = nbytes
        try:
            end = min(nbytes, self._geometry.round_up(reach))
            if old_size < end:
                await self._zeroer.write_zeroes(old_size, end - old_size, unmap=True)
            if self._is_raw:  # an entry leads everywhere, as in a new one
                await self._links.flush()
                first = self._geometry.round_up(old_size)
                await self._writer.preallocate(first, max(0, nbytes - first), writes=False)
            await self._links.flush()  # zeros of a part of a cluster are a copy, whose link may wait in the log (law 6)
            await self._root.set_size(nbytes)
        except BaseException:
            self._geometry.size = old_size
            raise
        cache, untouched = self._mapping.cache, self._longer_untouched(old_size)
        cache.resize()
        if untouched is not None:
            cache.set_untouched(untouched)

    def _longer_untouched(self, old_size: int) -> Untouched | None:
        """The untouched clusters of the external data file and what is new of it, which is stable by now."""
        known = self._mapping.cache.untouched
        if known is None:
            return None
        end = self._geometry.clusters(self._geometry.size)
        longer = known.longer(end)
        if not self._data.is_encrypted:
            longer.add(range(self._geometry.clusters(old_size), end))
        return longer

    async def _lengthen_data_file(self, old_size: int, nbytes: int) -> None:
        """Let the external data file be as long as the disk at least, and hold zeros past the disk's old end.

        Encrypted, what is there is noise, and no entry leads to it.
        """
        file = self._data.file
        end = min(await Size(file), nbytes)
        if end < nbytes:
            await Resize(file, nbytes)
        if old_size < end and not self._data.is_encrypted:
            await self._data.zero(old_size, end - old_size)

    async def _require_l1(self, nentries: int) -> None:
        """Return once the L1 table, wherever it lies, has *nentries* at least."""
        if nentries <= len(self._mapping.l1):
            return
        area = await self._allocator.allocate_area(self._geometry.clusters(nentries * ENTRY_SIZE))
        async with Rollback(self._reaper.free, area):
            await self._move_l1(nentries, area)

    async def _move_l1(self, nentries: int, area: range) -> None:
        """Let *area*, zeros, be the L1 table; the old one is freed once the header is stable without it."""
        bits = self._geometry.cluster_bits
        old, old_offset = self._mapping.l1, self._mapping.l1_offset
        await self._stability.write(area.start << bits, bytes_of(old))
        await self._stability.sync()  # the table, the counts of its clusters, the length of the file
        await self._root.allow_uncounted()
        await self._root.set_l1(area.start << bits, nentries)
        self._mapping.move_l1(old + array("Q", bytes((nentries - len(old)) * ENTRY_SIZE)), area.start << bits)
        self._mapping.own_metadata(area)
        if old:
            freed = range(old_offset >> bits, self._geometry.clusters(old_offset + len(old) * ENTRY_SIZE))
            self._mapping.disown_metadata(freed)
            await self._reaper.free(freed)
