"""What an image that may be written has besides: the parts that change it, wired up."""

import errno
from array import array
from contextlib import suppress

from qcow2.driver.operation import File
from qcow2.engine.allocation import Allocator
from qcow2.engine.bitmapdirectory import BitmapDirectory
from qcow2.engine.bitmapfitting import BitmapFitting
from qcow2.engine.bitmaps import Bitmaps
from qcow2.engine.bitmaptable import StoredBitmap
from qcow2.engine.compressed import CompressedClusters
from qcow2.engine.data import Data
from qcow2.engine.fetching import Fetcher
from qcow2.engine.growth import Grower
from qcow2.engine.links import Links
from qcow2.engine.mapping import Mapping
from qcow2.engine.metadata import table_limit
from qcow2.engine.packing import Packer
from qcow2.engine.reading import Reader
from qcow2.engine.reaper import Reaper
from qcow2.engine.refcount import Refcounts
from qcow2.engine.root import Root
from qcow2.engine.shedding import Shedder
from qcow2.engine.snapshots import Snapshots
from qcow2.engine.stability import Stability
from qcow2.engine.statistics import Statistics
from qcow2.engine.table import Tables
from qcow2.engine.uncounted import Uncounted
from qcow2.engine.write import Writer
from qcow2.engine.zeroing import Zeroer
from qcow2.error import MetadataOverlap
from qcow2.format.geometry import Geometry
from qcow2.format.snapshot import SnapshotTable
from qcow2.plane.linklog import LinkLog


class Changes:
    """What a writable image has besides: the parts that change it, wired up."""

    def __init__(
        self,
        file: File,
        data: Data,
        geometry: Geometry,
        mapping: Mapping,
        reader: Reader,
        root: Root,
        refcount_table: "array[int]",
        stability: Stability,
        statistics: Statistics,
        log: LinkLog | None,
        compressed: CompressedClusters,
        *,
        file_size: int,
        snapshots: SnapshotTable,
        owned_by_snapshots: "array[int]",
        bitmaps: list[StoredBitmap],
        owned_by_bitmaps: "array[int]",
        backing_size: int | None,
    ) -> None:
        table_offset = root.header.record.refcount_table_offset
        self.root = root
        self._stability = stability
        refcounts = Refcounts(file, geometry, refcount_table, table_offset, stability, is_lazy=root.is_lazy)
        ntables = table_limit(mapping.l1, snapshots)
        self.uncounted = Uncounted(
            file, geometry, mapping, refcounts, root, stability, geometry.clusters(file_size), ntables
        )
        self._reaper = Reaper(file, geometry, refcounts, self.uncounted, stability, statistics)
        self._allocator = Allocator(
            file, geometry, refcounts, root, mapping, self._reaper, stability, statistics, file_size, self.uncounted
        )
        self._reaper.on_free = self._allocator.reuse
        mapping.cache.set_freed(self._reaper.freed)
        self.links = Links(geometry, mapping, self._reaper, stability, log)
        tables = Tables(file, geometry, mapping, self._allocator, self._reaper, root, stability, statistics)
        self.writer = Writer(
            data, geometry, mapping, reader, tables, self._allocator, self._reaper, root, self.links, statistics
        )
        self.packer = Packer(
            file,
            geometry,
            mapping,
            tables,
            self._allocator,
            self._reaper,
            refcounts,
            root,
            self.links,
            stability,
            self.writer,
            compressed,
        )
        has_backing = backing_size is not None
        self.zeroer = Zeroer(
            geometry,
            mapping,
            reader,
            self.writer,
            tables,
            self.links,
            self._reaper,
            has_backing=has_backing,
            data_file=data.file,
            is_raw=root.header.record.has_raw_data,
        )
        self.fetcher = Fetcher(geometry, mapping, self.writer, self.zeroer)
        self.grower = Grower(
            geometry, mapping, self._allocator, self._reaper, root, self.zeroer, stability, backing_size or 0
        )
        self.snapshots = Snapshots(
            file,
            geometry,
            mapping,
            self._allocator,
            self._reaper,
            refcounts,
            root,
            stability,
            snapshots,
            owned_by_snapshots,
        )
        self.shedder = Shedder(
            geometry, mapping, self.zeroer, self.links, self.snapshots, self._allocator, root, stability
        )
        self.bitmaps = Bitmaps(
            file,
            geometry,
            mapping,
            self._allocator,
            self._reaper,
            root,
            self.links,
            stability,
            bitmaps,
            owned_by_bitmaps,
        )
        self.fitting = BitmapFitting(file, geometry, self._allocator, self._reaper, root, stability, self.bitmaps)
        self.bitmap_directory = BitmapDirectory(geometry, self._allocator, self._reaper, root, stability, self.bitmaps)

    @property
    def may_overwrite(self) -> bool:
        """Whether data may be overwritten: no promise of the header is broken by it, and no flag that is wrong hit."""
        return not self.root.has_promises and not self.uncounted.is_due

    def set_backing(self, size: int | None) -> None:
        """Something else shows through now, *size* bytes long; None: nothing does."""
        self.zeroer.set_backing(has_backing=size is not None)
        self.grower.backing_size = size or 0

    def require_trust(self) -> None:
        """Raises: OSError(EIO) if the image takes no more writes, be it the extent map that has found out why."""
        self._allocator.require_links()

    async def condemn(self, error: MetadataOverlap) -> None:
        """Mark the image corrupt, and take no more writes: one has met *error*."""
        with suppress(OSError):  # the host's, which ends all writes as well
            await self.root.mark_corrupt()
        self._stability.fail(OSError(errno.EIO, str(error)))

    async def settle(self) -> None:
        """Bring the disk in the state of a clean close."""
        await self.links.close()
        await self.bitmaps.settle()
        await self.packer.settle()
        await self._allocator.collect()
        await self._reaper.drain()
        self.require_trust()
        await self._allocator.settle()
        await self._stability.sync()
        await self.root.mark_clean()
