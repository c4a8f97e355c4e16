"""What each part that changes an image knows of it."""

from contextlib import suppress

from qcow2.driver.operation import Grace, Zero
from qcow2.engine.opened import Opened
from qcow2.engine.root import Root
from qcow2.engine.space import Space


class Part:
    """A part that changes an image: all of them know the same things, by the same names."""

    def __init__(self, opened: Opened, root: Root, space: Space) -> None:
        self._file = opened.file
        self._data = opened.data
        self._geometry = opened.geometry
        self._mapping = opened.mapping
        self._reader = opened.reader
        self._stability = opened.stability
        self._statistics = opened.statistics
        self._root = root
        self._refcounts = space.refcounts
        self._allocator = space.allocator
        self._reaper = space.reaper

    @property
    def _ends_whole(self) -> bool:
        """Whether the last cluster of the external data file holds zeros past the disk's end, as QEMU supposes.

        Encrypted ones, that is; a hole is zeros where nothing is encrypted, and a raw file ends with the disk.
        """
        return self._data.is_encrypted and not self._root.header.record.has_raw_data

    async def _give_back(self, guest_offset: int, end: int) -> None:
        """Give back the space of a range of the external data file whose entries say zeros; the host may keep it.

        Encrypted, a hole is noise: so no power loss may bring an entry back that leads there (law 3), and who has begun
        to read there ends before (law 5). Raises: OSError.
        """
        if self._data.is_encrypted:
            await self._stability.sync()
            await Grace()
        with suppress(OSError):
            await Zero(self._data.file, guest_offset, end - guest_offset)
