"""A new image of compressed clusters: packed one behind the other, several in a host cluster, one in two."""

from array import array
from functools import partial
from typing import Any

from qcow2.driver.operation import Compute, File, Write
from qcow2.engine.compressed import level_of, packer
from qcow2.engine.create import Options
from qcow2.job.newimage import NewImage, Place
from qcow2.job.target import Runs
from qcow2.native import ffi, lib
from qcow2.node.node import Node

Packed = dict[int, bytes]  # stream of each cluster of the range that has become smaller
Streams = list[tuple[int, bytes]]  # with where in the file they are
MAX_SHARED = 0xFFFF  # streams in one host cluster


class NewCompressedImage(NewImage):
    """What gets no smaller is as in any image. Memory: 2 bytes for each host cluster, to count who shares it."""

    def __init__(
        self,
        file: File,
        options: Options,
        backing: Node | None = None,
        *,
        level: int | None = None,
        reads_zeros: bool = True,
    ) -> None:
        """As of any new image. Raises: ValueError if there is no such *level*."""
        super().__init__(file, options, backing, reads_zeros=reads_zeros)
        self.plain = None
        self._level = level_of(options.compression, level)
        self._most = min(MAX_SHARED, (1 << (1 << options.refcount_order)) - 1)
        self._cursor = 0  # where in the file the next stream may begin; 0: nowhere
        self._shared = array("H")  # for each host cluster how many streams; 0: no stream's, counted once

    async def pack(self, data: memoryview, runs: Runs) -> Packed:
        """Compress the clusters that hold anything."""
        clusters = [index for low, high in self._touched(0, runs) for index in range(low, high)]
        packed: Packed = await Compute(partial(self._compress, data, clusters))
        return packed

    def _compress(self, data: memoryview, clusters: list[int]) -> Packed:
        packed = {}
        pack = packer(self._options.compression, self._level)
        for index in clusters:
            content = data[index * self.unit : (index + 1) * self.unit]
            if len(content) < self.unit:  # the disk's last one
                content = memoryview(bytes(content).ljust(self.unit, b"\0"))
            stream = pack(content)
            if stream:
                packed[index] = stream
        return packed

    def place(self, offset: int, nbytes: int, runs: Runs, packed: object = None) -> Any:
        """The places of streams, with the streams, beside those of clusters that are as they are."""
        assert isinstance(packed, dict | None)
        first = offset // self.unit
        plain: Place = []
        streams: Streams = []
        for low, high in self._ranges(offset, nbytes, runs):
            for cluster in range(low, high):
                stream = None if packed is None else packed.get(cluster - first)
                if stream is None:
                    plain += self._take(cluster, cluster + 1)
                else:
                    streams.append((self._take_bytes(cluster, len(stream)), stream))
        return plain if packed is None else (plain, streams)

    def _take_bytes(self, cluster: int, nbytes: int) -> int:
        """A place in the file for the stream of a guest cluster."""
        bits = self._options.cluster_bits
        host, inside = self._cursor >> bits, self._cursor & self.unit - 1
        fits = inside + nbytes <= self.unit
        if not inside or self._count(host) >= self._most or not (fits or host + 1 == self._next):
            host, inside, fits = self._next, 0, True
            self._next += 1
        self._add(host)
        if not fits:
            self._next += 1
            self._add(host + 1)
        start = (host << bits) + inside
        self._cursor = start + nbytes
        self._set(cluster, self._entries.descriptor(start, nbytes))
        return start

    def _count(self, host: int) -> int:
        return self._shared[host] if host < len(self._shared) else 0

    def _add(self, host: int) -> None:
        if host >= len(self._shared):
            self._shared.frombytes(bytes(2 * (host + 1 - len(self._shared))))
        self._shared[host] += 1

    async def put(self, offset: int, data: memoryview, runs: Runs, place: object) -> None:
        """Streams that follow one another are written at once."""
        assert isinstance(place, tuple)
        plain, streams = place
        await super().put(offset, data, runs, plain)
        begin, end = 0, 0
        pieces: list[bytes] = []
        for host_offset, stream in streams:
            if host_offset != end:
                await self._write_streams(begin, pieces)
                begin, pieces = host_offset, []
            pieces.append(stream)
            end = host_offset + len(stream)
        await self._write_streams(begin, pieces)

    async def _write_streams(self, host_offset: int, streams: list[bytes]) -> None:
        """Not a byte more than theirs: the next one of the sector may be under way."""
        if streams:
            await Write(self._file, host_offset, b"".join(streams), data=True)

    def _refcounts(self, first: int, count: int) -> bytes:
        ones = bytearray(super()._refcounts(first, count))
        block = ffi.from_buffer("uint8_t[]", ones)
        for index, shared in enumerate(self._shared[first : first + count]):
            if shared > 1:
                lib.refcount_set(block, self._options.refcount_order, index, shared)
        return bytes(ones)
