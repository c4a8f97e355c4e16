"""An open image as who only looks at it sees it. Coroutines that reach the disk only through operations."""

from array import array
from collections.abc import Callable, Sequence

from qcow2.driver.operation import Allocated, Buffer, File, Size
from qcow2.engine.backing import Backing, Capabilities, Place, Seen
from qcow2.engine.compressed import CompressedClusters
from qcow2.engine.data import Data, SectorCipher
from qcow2.engine.mapping import Mapping
from qcow2.engine.opened import Opened, OpenOptions
from qcow2.engine.reading import Reader
from qcow2.engine.stability import Stability
from qcow2.engine.statistics import Statistics
from qcow2.format.geometry import Geometry
from qcow2.format.header import Header
from qcow2.plane.l2cache import ExtentMap, L2Cache, Run


class ReadableImage:
    """An open qcow2 image, as far as nothing of it changes; `Image` is one that may."""

    def __init__(
        self, file: File, data: Data, header: Header, l1: "array[int]", backing: Backing | None, options: OpenOptions
    ) -> None:
        self.file = file
        self.geometry = geometry = Geometry.of(header.record)
        self.backing = backing
        self._header = header
        self._data = data
        self._native = data.native
        self._statistics = statistics = Statistics()
        self.on_failure: Callable[[], None] = lambda: None  # told once, when the image takes no more writes
        self._slot: int | None = None
        self._is_hollow: bool | None = None  # nobody has asked yet
        self._cache = cache = L2Cache(geometry, options.cache_size)
        self._stability = stability = Stability(file, statistics, self._refuse_writes, data.file)
        l1_offset = header.record.l1_table_offset
        self._mapping = mapping = Mapping(file, geometry, cache, l1, l1_offset, stability, statistics)
        compressed = CompressedClusters(file, geometry, header.compression_type, statistics)
        self._reader = reader = Reader(data, mapping, compressed, backing)
        self._opened = Opened(file, data, geometry, mapping, reader, compressed, stability, statistics)
        if self._native is not None:
            cache.set_cipher(*self._native)
        if backing is not None:
            cache.set_backing(backing.extent_map, backing.size, backing)

    @property
    def statistics(self) -> Statistics:
        """What the engine has counted, and the slices that the extent map has loaded, the entries it has cleared."""
        return self._statistics + Statistics(l2_loads=self._cache.loads, metadata_writes=self._cache.clears)

    @property
    def header(self) -> Header:
        """The header as it was when the image was opened."""
        return self._header

    @property
    def is_encrypted(self) -> bool:
        """Whether what it stores of the disk is encrypted."""
        return self._data.is_encrypted

    @property
    def cipher(self) -> SectorCipher | None:
        """By which it is."""
        return self._data.cipher

    @property
    def size(self) -> int:
        """Length of the disk in bytes."""
        return self.geometry.size

    @property
    def chain(self) -> "Sequence[Backing]":
        """This image and what is under it, top first."""
        return [self, *(self.backing.chain if self.backing is not None else ())]

    @property
    def extent_map(self) -> ExtentMap:
        """The addresses the worker takes; they answer for the whole chain, as long as this image is referenced."""
        return self._cache.extent_map

    @property
    def data_file(self) -> File:
        """The image's own, or its external data file."""
        return self._data.file

    @property
    def capabilities(self) -> Capabilities:
        """Clusters, snapshots and bitmaps."""
        return Capabilities(
            self.geometry.cluster_size,
            has_snapshots=not self.geometry.has_data_file,
            has_bitmaps=True,
            writes_to_grow=self._header.record.has_raw_data and self.is_encrypted,
        )

    @property
    def used_lately(self) -> list[range]:
        """Where the disk was read or written, as far as the cache of L2 slices tells: in guest bytes."""
        nbytes = 1 << self.geometry.slice_bits
        return [range(number * nbytes, min((number + 1) * nbytes, self.size)) for number in self._cache.used()]

    def set_slot(self, file: File, slot: int | None) -> None:
        """Say which of the worker's files *file*, one of the chain's, is; None takes it back."""
        is_told = self._native is not None or not self._data.is_encrypted  # else only Python can tell
        if file is self.file and is_told:
            self._slot = slot
            self._cache.set_file(slot, writable=self._may_overwrite())
        elif file is self._data.file and is_told:
            self._cache.set_data_file(slot)
        elif self.backing is not None:
            self.backing.set_slot(file, slot)

    def _may_overwrite(self) -> bool:
        """Whether the extent map may answer writes."""
        return False

    @property
    def failure(self) -> OSError | None:
        """Why it takes no more writes, if it takes none."""
        return self._stability.failure

    def fail(self, error: OSError) -> None:
        """Take no more writes because of *error*; reads go on, close leaves the dirty bit."""
        self._stability.fail(error)

    async def lose(self, error: OSError) -> None:
        """`fail` because of *error*, with which a sync failed; the next open for writing writes all tables again."""
        await self._stability.lose(error)

    def _refuse_writes(self) -> None:
        self._cache.set_file(self._slot, writable=False)
        self.on_failure()

    async def resolve(self, guest_offset: int, nbytes: int) -> Run:
        """Describe the longest run at *guest_offset* that this image, without its backing file, maps in one way."""
        return await self._mapping.resolve(guest_offset, nbytes)

    async def is_hollow(self) -> bool:
        """Whether much of the file is holes, so that data of the mapping may be none of the host's.

        The rule is QEMU's for images with preallocated metadata, but that it counts what has references.
        """
        if self._data.is_encrypted:  # a hole holds no zeros
            return False
        if self._is_hollow is None:
            size = self.geometry.clusters(await Size(self.file))
            held = await Allocated(self.file) >> self.geometry.cluster_bits
            self._is_hollow = size >= max(held * 10 // 9, held + 2)
        return self._is_hollow

    async def reads_as_zeros(self, guest_offset: int, nbytes: int) -> bool:
        """Whether the mappings of the chain show, without a look at data, that the range reads as zeros."""
        return await self._reader.reads_as_zeros(guest_offset, nbytes)

    async def find(self, guest_offset: int, nbytes: int) -> Place | Seen:
        """Where in the files of the chain the range is, if it is in one piece."""
        return await self._reader.find(guest_offset, nbytes)

    async def read(self, guest_offset: int, target: Buffer) -> None:
        """Fill *target*, which lies inside the disk.

        Raises: OSError, CorruptImage.
        """
        await self._reader.read(guest_offset, target)
