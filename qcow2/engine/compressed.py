"""Compressed clusters: where their bytes are, and what they hold."""

import io
import sys
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from qcow2.driver.operation import Compute, File, Read, Signal
from qcow2.engine.statistics import Statistics
from qcow2.engine.turns import Turns
from qcow2.error import CorruptImage
from qcow2.format.geometry import Geometry
from qcow2.format.layout import CompressionType
from qcow2.native import check, ffi, lib
from qcow2.plane.entry import Entries

Content: TypeAlias = bytes | bytearray  # of a cluster; nobody changes it

CACHE_BYTES = 4 << 20
UNPACKING_BYTES = 32 << 20  # of streams and clusters under way, at most
LEVELS = {CompressionType.ZLIB: range(1, 13), CompressionType.ZSTD: range(1, 20)}  # of libdeflate and zstd
# Level 4 of libdeflate makes streams 3 to 6 % shorter than qemu-img's (zlib's 6 with a window of 4 KiB) in 0.4 of its
# time, level 6 another 3 % in 0.6 (programs and texts of Debian 12).
DEFAULT_LEVELS = {CompressionType.ZLIB: 4, CompressionType.ZSTD: 3}
ZSTD_WINDOW_LOG = 27  # the library's own limit, and QEMU's; of the window only as much is touched as a cluster has


@dataclass(frozen=True, slots=True)
class Payload:
    """The bytes that may belong to one compressed cluster; the stream may end earlier."""

    host_offset: int
    nbytes: int

    @classmethod
    def of(cls, entry: int, entries: Entries) -> "Payload":
        """What a compressed L2 entry says."""
        return cls(*entries.payload(entry))

    def host_clusters(self, geometry: Geometry) -> range:
        """Numbers of the host clusters it touches; each counts one reference for it."""
        last = self.host_offset + self.nbytes - 1
        return range(geometry.cluster_of(self.host_offset), geometry.cluster_of(last) + 1)


def inflate(data: bytes, cluster_size: int) -> Content:
    """Decompress a raw deflate stream, up to *cluster_size* bytes; what follows it is ignored.

    libdeflate takes only streams that end where the cluster does. zlib has the last word on all others, such as one
    whose end marker was cut off, which QEMU reads.
    Raises: ValueError if it is none.
    """
    cluster = bytearray(cluster_size)
    stream, target = ffi.from_buffer("uint8_t[]", data), ffi.from_buffer("uint8_t[]", cluster)
    if lib.inflate_cluster(stream, len(data), target, cluster_size) == 0:
        return cluster
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, cluster_size)
    except zlib.error as error:
        raise ValueError(str(error)) from error


def unpack_zstd(data: bytes, cluster_size: int) -> bytes:
    """Decompress zstd frames, up to *cluster_size* bytes; what follows them is ignored.

    Raises: ValueError if there are none.
    """
    if sys.version_info >= (3, 14):
        return _unpack_with_stdlib(data, cluster_size)
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << ZSTD_WINDOW_LOG)
    try:
        reader = decompressor.stream_reader(io.BytesIO(data), read_across_frames=True)
        return bytes(reader.read(cluster_size))
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error


if sys.version_info >= (3, 14):

    def _unpack_with_stdlib(data: bytes, cluster_size: int) -> bytes:
        from compression import zstd

        options = {zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG}
        output = b""
        try:
            while data and len(output) < cluster_size:
                frame = zstd.ZstdDecompressor(options=options)
                output += frame.decompress(data, cluster_size - len(output))
                data = frame.unused_data if frame.eof else b""
        except zstd.ZstdError as error:
            raise ValueError(str(error)) from error
        return output


UNPACK: dict[CompressionType, Callable[[bytes, int], Content]] = {
    CompressionType.ZLIB: inflate,
    CompressionType.ZSTD: unpack_zstd,
}


def deflate(level: int, cluster: memoryview) -> bytes:
    """Compress a cluster to a raw deflate stream; none if that is no shorter.

    Its window is up to 32 KiB, which the format allows and QEMU reads, though it writes 4 KiB itself.
    """
    stream = ffi.new("uint8_t[]", len(cluster) - 1)
    nbytes = check(lib.deflate_cluster(ffi.from_buffer("uint8_t[]", cluster), len(cluster), level, stream, len(stream)))
    return bytes(ffi.buffer(stream, nbytes))


def level_of(compression_type: CompressionType, level: int | None) -> int:
    """*level* if there is such a one; None is the default. Raises: ValueError."""
    if level is None:
        return DEFAULT_LEVELS[compression_type]
    levels = LEVELS[compression_type]
    if level not in levels:
        name = compression_type.name.lower()
        raise ValueError(f"{name} compression level {level} is not in {levels.start} to {levels.stop - 1}")
    return level


def packer(compression_type: CompressionType, level: int | None = None) -> Callable[[memoryview], bytes]:
    """What compresses clusters, on one thread, one after the other; an empty stream says that it got no shorter.

    Raises: ValueError for a level that there is not.
    """
    level = level_of(compression_type, level)
    if compression_type is CompressionType.ZLIB:
        return partial(deflate, level)
    compress = _zstd_compress(level)

    def pack(cluster: memoryview) -> bytes:
        stream = compress(cluster)
        return stream if len(stream) < len(cluster) else b""

    return pack


def _zstd_compress(level: int) -> Callable[[memoryview], bytes]:
    if sys.version_info >= (3, 14):
        from compression import zstd

        return partial(zstd.compress, level=level)
    import zstandard

    return zstandard.ZstdCompressor(level=level).compress


class _Unpacking:
    """A cluster being read and decompressed; whoever else wants it waits and takes the outcome."""

    def __init__(self) -> None:
        self.ended = Signal()
        self.content: Content = b""
        self.error: BaseException | None = None
        self.is_of_before = False  # another payload has come to lie there meanwhile


class CompressedClusters:
    """Reads compressed clusters of one file; keeps the last few, and reads none twice at a time."""

    def __init__(
        self, file: File, geometry: Geometry, compression_type: CompressionType, statistics: Statistics
    ) -> None:
        self._file = file
        self._geometry = geometry
        self._entries = Entries.of(geometry)
        self.compression_type = compression_type
        self._unpack = UNPACK[compression_type]
        self._statistics = statistics
        self._kept: OrderedDict[int, Content] = OrderedDict()
        self._limit = max(1, CACHE_BYTES // geometry.cluster_size)
        self._under_way: dict[int, _Unpacking] = {}
        self._having_turns: dict[int, Signal] = {}
        self._turns = Turns(max(2, UNPACKING_BYTES // (2 * geometry.cluster_size)))

    def is_at_hand(self, entry: int) -> bool:
        """Whether `read` of *entry* takes no memory that others have not taken already."""
        return entry in self._kept or entry in self._under_way

    @asynccontextmanager
    async def turn(self, entry: int) -> AsyncIterator[None]:
        """Inside, *entry* may be read: few are at a time. Who wants what another one has its turn for waits for that.

        It is kept when it ends, so that a crowd decompresses it once.
        """
        if entry in self._having_turns:
            await self._having_turns[entry].wait()
            yield
            return
        ended = self._having_turns[entry] = Signal()
        try:
            async with self._turns:
                yield
        finally:
            del self._having_turns[entry]
            ended.set()

    async def read(self, entry: int) -> Content:
        """The whole cluster that a compressed L2 *entry*, just resolved, names.

        Never reads the file after having waited: the cluster may have been freed meanwhile.
        Raises: CorruptImage if it is not a stream of one cluster.
        """
        if entry in self._kept:
            self._kept.move_to_end(entry)
            return self._kept[entry]
        if entry not in self._under_way:
            return await self._read_first(entry)
        unpacking = self._under_way[entry]
        await unpacking.ended.wait()
        if unpacking.error is not None:
            raise unpacking.error
        return unpacking.content

    async def _read_first(self, entry: int) -> Content:
        unpacking = self._under_way[entry] = _Unpacking()
        try:
            content = unpacking.content = await self._decompress(Payload.of(entry, self._entries))
        except BaseException as error:  # passed on to those who wait for it, and raised here
            unpacking.error = error
            raise
        finally:
            if not unpacking.is_of_before:
                del self._under_way[entry]
            unpacking.ended.set()
        if not unpacking.is_of_before:
            self._keep(entry, content)
        return content

    def forget(self, entry: int) -> None:
        """A new payload lies where *entry* says, which nothing refers to yet: nobody joins who reads the old one."""
        self._kept.pop(entry, None)
        if (unpacking := self._under_way.pop(entry, None)) is not None:
            unpacking.is_of_before = True

    def _keep(self, entry: int, content: Content) -> None:
        self._kept[entry] = content
        if len(self._kept) > self._limit:
            self._kept.popitem(last=False)

    async def _decompress(self, payload: Payload) -> Content:
        self._statistics.decompressions += 1
        data = await Read(self._file, payload.host_offset, payload.nbytes)
        cluster_size = self._geometry.cluster_size
        try:
            content: Content = await Compute(partial(self._unpack, data, cluster_size))
        except ValueError as error:
            raise CorruptImage(self._file.path, payload.host_offset, f"compressed cluster: {error}") from error
        if len(content) != cluster_size:
            message = f"compressed cluster holds {len(content)} bytes, not {cluster_size}"
            raise CorruptImage(self._file.path, payload.host_offset, message)
        return content
