"""What an image that may be written has besides: the parts that change it, wired up."""

import errno
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from qcow2.engine.bitmapdirectory import BitmapDirectory
from qcow2.engine.bitmapfitting import BitmapFitting
from qcow2.engine.bitmaps import Bitmaps
from qcow2.engine.fetching import Fetcher
from qcow2.engine.growth import Grower
from qcow2.engine.links import Links
from qcow2.engine.opened import Found, Opened
from qcow2.engine.packing import Packer
from qcow2.engine.root import Root
from qcow2.engine.shedding import Shedder
from qcow2.engine.snapshots import Snapshots
from qcow2.engine.space import Space
from qcow2.engine.table import Tables
from qcow2.engine.write import Writer
from qcow2.engine.zeroing import Zeroer
from qcow2.error import MetadataOverlap, no_memory
from qcow2.plane.linklog import LinkLog

T = TypeVar("T")


class Changes:
    """What a writable image has besides: the parts that change it, wired up."""

    def __init__(self, opened: Opened, root: Root, found: Found, log: LinkLog | None) -> None:
        self.root = root
        self._stability = opened.stability
        self._space = space = Space(opened, root, found)
        self.uncounted = space.uncounted
        self.links = links = Links(opened, space.reaper, log)
        self.tables = tables = Tables(opened, root, space)
        self.writer = Writer(opened, root, space, links, tables)
        self.packer = Packer(opened, root, space, links, tables, self.writer)
        self.zeroer = Zeroer(opened, root, space, links, tables, self.writer)
        self.fetcher = Fetcher(opened.geometry, opened.mapping, self.writer, self.zeroer)
        self.grower = Grower(opened, root, space, links, self.zeroer, self.writer)
        self.snapshots = Snapshots(opened, root, space, found)
        self.shedder = Shedder(opened, root, space, links, self.zeroer, self.snapshots)
        self.bitmaps = Bitmaps(opened, root, space, links, found)
        self.fitting = BitmapFitting(opened, root, space, self.bitmaps)
        self.bitmap_directory = BitmapDirectory(opened, root, space, self.bitmaps)

    @property
    def may_overwrite(self) -> bool:
        """Whether data may be overwritten: no promise of the header is broken by it, and no flag that is wrong hit."""
        return not self.root.has_promises and not self.uncounted.is_due

    def require_trust(self) -> None:
        """Raises: OSError(EIO) if the image takes no more writes, be it the extent map that has found out why."""
        self._space.allocator.require_links()

    async def make_ready(self) -> None:
        """Have clusters that may be linked, so that the next write waits for no sync. Raises: OSError."""
        await self.root.allow_uncounted()
        await self._space.allocator.stock_up()
        self._space.allocator.allow_links()

    async def guard(self, change: Coroutine[Any, Any, T]) -> T:
        """Make *change*; the image is marked corrupt and takes no more if it would hit metadata.

        Nor does it once memory ran out in the middle: nobody knows how far the change came.
        """
        try:
            return await change
        except MemoryError:
            self._stability.fail(no_memory())
            raise
        except MetadataOverlap as error:
            with suppress(OSError):  # the host's, which ends all writes as well
                await self.root.mark_corrupt()
            self._stability.fail(OSError(errno.EIO, str(error)))
            raise

    async def close(self) -> None:
        """Bring the disk in the state of a clean close; dirty if flags or counts are wrong since a snapshot failed."""
        await self.links.close()
        await self.bitmaps.settle()
        await self.packer.close()
        await self._space.allocator.collect()
        await self._space.reaper.drain()
        self.require_trust()
        await self._space.allocator.close()
        await self._stability.sync()
        await self.root.mark_clean()
