"""The image: what people use. Coroutines that reach the disk only through `qcow2.operation`."""

import errno
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from qcow2.compressed import CompressedClusters
from qcow2.geometry import Geometry
from qcow2.header import Header, clear_autoclear, read_header, require_uncorrupted
from qcow2.l2cache import ExtentMap, L2Cache, Run
from qcow2.layout import ENTRY_SIZE
from qcow2.mapping import Mapping, entries_of
from qcow2.operation import Buffer, File, Read, Size
from qcow2.raw import RawImage
from qcow2.reading import Reader
from qcow2.stability import Stability
from qcow2.statistics import Statistics

DEFAULT_CACHE_SIZE = 32 << 20


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """How to open an image."""

    writable: bool = False
    lazy_refcounts: bool | None = None  # None: as the image says
    cache_size: int = DEFAULT_CACHE_SIZE  # bytes of L2 tables in memory, at most


class Image:
    """An open qcow2 image. Its coroutines may run side by side on one scheduler; nothing else may touch it."""

    def __init__(
        self, file: File, header: Header, l1: "array[int]", backing: "Image | RawImage | None", options: OpenOptions
    ) -> None:
        self.file = file
        self.header = header
        self.geometry = Geometry.of(header.record)
        self.size = self.geometry.size
        self.backing = backing
        self.read_only = not options.writable
        self.statistics = Statistics()
        self._slot: int | None = None
        self._stability = Stability(file, self.statistics, self._refuse_writes)
        self._cache = L2Cache(self.geometry, options.cache_size)
        self._mapping = Mapping(
            file, self.geometry, self._cache, l1, header.record.l1_table_offset, self._stability, self.statistics
        )
        self._compressed = CompressedClusters(file, self.geometry, header.compression_type, self.statistics)
        self._reader = Reader(file, self._mapping, self._compressed, backing)
        if backing is not None:
            self._cache.set_backing(backing.extent_map, backing.size, backing)

    @classmethod
    async def open(
        cls, file: File, *, backing: "Image | RawImage | None" = None, options: OpenOptions | None = None
    ) -> "Image":
        """Open the image in *file*, already locked, over *backing*, already open.

        Raises: UnsupportedImage, CorruptImage.
        """
        options = options or OpenOptions()
        header = await read_header(file)
        if options.writable:
            raise OSError(errno.EROFS, "images are only read so far", file.path)
            require_uncorrupted(file, header)
            header = await clear_autoclear(file, header)
        record = header.record
        l1 = entries_of(await Read(file, record.l1_table_offset, record.l1_size * ENTRY_SIZE))
        image = cls(file, header, l1, backing, options)
        image._mapping.set_file_end(await Size(file))
        return image

    @property
    def chain(self) -> "Sequence[Image | RawImage]":
        """This image and what is under it, top first."""
        return [self, *(self.backing.chain if self.backing is not None else ())]

    @property
    def extent_map(self) -> ExtentMap:
        """The addresses the worker takes; they answer for the whole chain, as long as this image is referenced."""
        return self._cache.extent_map

    def set_slot(self, file: File, slot: int | None) -> None:
        """Say which of the worker's files *file*, one of the chain's, is; None takes it back."""
        if file is self.file:
            self._slot = slot
            self._cache.set_file(slot, writable=not self.read_only and self._stability.error is None)
        elif self.backing is not None:
            self.backing.set_slot(file, slot)

    def fail(self, error: OSError) -> None:
        """Take no more writes because of *error*; reads go on, close leaves the dirty bit."""
        self._stability.fail(error)

    def _refuse_writes(self) -> None:
        self._cache.set_file(self._slot, writable=False)

    def _require_writable(self) -> None:
        if self.read_only:
            raise OSError(errno.EROFS, "opened read-only", self.file.path)
        self._stability.require_trust()

    async def resolve(self, guest_offset: int, nbytes: int) -> Run:
        """Describe the longest run at *guest_offset* that this image, without its backing file, maps in one way."""
        return await self._mapping.resolve(guest_offset, nbytes)

    async def reads_as_zeros(self, guest_offset: int, nbytes: int) -> bool:
        """Whether the mappings of the chain show, without a look at data, that the range reads as zeros."""
        return await self._reader.reads_as_zeros(guest_offset, nbytes)

    async def read(self, guest_offset: int, target: Buffer) -> None:
        """Fill *target*, which lies inside the disk.

        Raises: OSError, CorruptImage.
        """
        await self._reader.read(guest_offset, target)

    async def write(self, guest_offset: int, source: Buffer) -> None:
        """Put *source* at *guest_offset*; process-safe on return, stable after `flush`.

        Raises: OSError; then nothing, a part or all of it is written.
        """
        self._require_writable()

    async def write_zeroes(self, guest_offset: int, nbytes: int, *, unmap: bool) -> None:
        """Make the range read as zeros; *unmap* lets go of its host clusters, where it covers them."""
        self._require_writable()

    async def discard(self, guest_offset: int, nbytes: int) -> None:
        """Let go of the host clusters that the range covers; they read as zeros, the rest stays as it is."""
        self._require_writable()

    async def flush(self) -> None:
        """Make every write that has completed stable."""
        if not self.read_only:
            await self._stability.sync()

    async def close(self) -> None:
        """Leave the image clean: refcounts written, everything stable, then the dirty bit cleared.

        Raises: OSError if that failed now or a write or sync failed before; the dirty bit is then as it was.
        """
