"""Decompression: whatever the stream, a cluster or a clear refusal, in bounded memory."""

import contextlib
import zlib
from collections.abc import Iterable

import pytest
import zstandard

from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.operation import Compute, File, Operation, Read, Write
from qcow2.engine.compressed import UNPACKING_BYTES, CompressedClusters, Payload, inflate, unpack_zstd
from qcow2.engine.image import Image
from qcow2.engine.statistics import Statistics
from qcow2.format.geometry import Geometry
from qcow2.format.layout import CompressionType
from qcow2.plane.entry import Entries
from tests.crash.driver import CrashDriver, SimulatedFile
from tests.engine import Bench, noise, set_up

pytestmark = pytest.mark.pure

CLUSTER = 65536
TEXT = (b"a line that repeats itself, %d times\n" * 3000)[:CLUSTER]


def deflate(data: bytes, window_bits: int = -12) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, window_bits)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize("window_bits", [-9, -12, -15])
def test_deflate_of_any_window_is_read(window_bits: int) -> None:
    assert inflate(deflate(TEXT, window_bits), CLUSTER) == TEXT


@pytest.mark.parametrize("level", [1, 3, 19])
def test_zstd_of_any_level_is_read(level: int) -> None:
    assert unpack_zstd(zstandard.ZstdCompressor(level=level).compress(TEXT), CLUSTER) == TEXT


def test_zstd_in_several_frames_is_read() -> None:
    pack = zstandard.ZstdCompressor().compress
    assert unpack_zstd(pack(TEXT[:1000]) + pack(TEXT[1000:]), CLUSTER) == TEXT


@pytest.mark.parametrize("unpack", [inflate, unpack_zstd])
def test_what_follows_the_stream_is_ignored(unpack) -> None:  # type: ignore[no-untyped-def]
    packed = deflate(TEXT) if unpack is inflate else zstandard.compress(TEXT)
    assert unpack(packed + noise(3000), CLUSTER) == TEXT


@pytest.mark.parametrize("unpack", [inflate, unpack_zstd])
def test_a_stream_of_too_much_stops_at_a_cluster(unpack) -> None:  # type: ignore[no-untyped-def]
    bomb = bytes(8 << 20)
    packed = deflate(bomb) if unpack is inflate else zstandard.compress(bomb)
    assert unpack(packed, CLUSTER) == bytes(CLUSTER)


def test_deflate_without_its_end_marker_is_read() -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    packed = packer.compress(TEXT) + packer.flush(zlib.Z_FULL_FLUSH)  # every byte, and no last block
    assert inflate(packed, CLUSTER) == TEXT


@pytest.mark.parametrize("unpack", [inflate, unpack_zstd])
def test_a_stream_cut_short_is_no_cluster(unpack) -> None:  # type: ignore[no-untyped-def]
    packed = deflate(noise(CLUSTER)) if unpack is inflate else zstandard.compress(noise(CLUSTER))
    with contextlib.suppress(ValueError):
        assert len(unpack(packed[:1000], CLUSTER)) < CLUSTER


@pytest.mark.parametrize("unpack", [inflate, unpack_zstd])
def test_noise_is_refused_or_short(unpack) -> None:  # type: ignore[no-untyped-def]
    for seed in range(200):
        with contextlib.suppress(ValueError):
            assert len(unpack(noise(4096, seed), CLUSTER)) <= CLUSTER


def test_a_zstd_window_larger_than_decoders_must_take_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, write_content_size=False)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    packed = packer.compress(TEXT) + packer.flush()
    with pytest.raises(ValueError, match=r"memory|window|Frame"):
        unpack_zstd(packed, CLUSTER)


@pytest.mark.parametrize("cluster_bits", [9, 16, 21])
def test_a_payload_reaches_to_the_end_of_its_last_sector(cluster_bits: int) -> None:
    geometry = Geometry.of(set_up(1 << 20, cluster_bits=cluster_bits).image.header.record)
    shift = 62 - (cluster_bits - 8)
    payload = Payload.of(1 << 62 | 1 << shift | (3 << cluster_bits) + 100, Entries.of(geometry))
    assert payload == Payload((3 << cluster_bits) + 100, 1024 - 100)
    assert payload.host_clusters(geometry) == (range(3, 5) if cluster_bits == 9 else range(3, 4))


LARGE = 2 << 20


def large_compressed(count: int) -> Bench:
    """A disk of *count* compressed clusters of 2 MiB, each with a line of its own."""
    bench = set_up(count * LARGE, cluster_bits=21)
    streams = [deflate(((b"%6d\n" % number) * (LARGE // 7 + 1))[:LARGE]) for number in range(count)]
    step = 16384
    assert max(map(len, streams)) <= step
    bench.write(0, b"".join(stream.ljust(step, b"\0") for stream in streams))
    bench.close()
    file = bench.file
    table = int.from_bytes(file.read(int.from_bytes(file.read(40, 8), "big"), 8), "big") & ~(1 << 63)
    host_offset = int.from_bytes(file.read(table, 8), "big") & ~(1 << 63)
    made = Entries(21, 3)
    entries = made.pack(made.descriptor(host_offset + n * step, step) for n in range(count))
    bench.driver.run(write_all(file, table, entries))
    return Bench(bench.driver, bench.breaker, file, None, bench.driver.run(Image.open(file)))


async def write_all(file: File, host_offset: int, data: bytes) -> None:
    await Write(file, host_offset, data)


def read_small(bench: Bench, numbers: Iterable[int]) -> None:
    """Read a few bytes of each of the clusters *numbers*, all at once."""

    async def read(number: int) -> None:
        target = bytearray(700)
        await bench.image.read(number * LARGE, MemoryBuffer(memoryview(target)))
        assert target == (b"%6d\n" % number) * 100

    for number in numbers:
        bench.driver.spawn(read(number))
    bench.driver.finish()


def test_a_crowd_of_reads_decompresses_each_cluster_once() -> None:
    bench = large_compressed(20)
    read_small(bench, [number for _ in range(25) for number in range(20)])
    assert bench.image.statistics.decompressions == 20


def test_few_large_clusters_are_in_memory_at_a_time() -> None:
    bench = large_compressed(40)
    begun: list[type[Operation]] = []

    def note(operation: Operation) -> None:
        begun.append(type(operation))

    bench.breaker.fault = note
    read_small(bench, range(40))
    assert begun.count(Compute) == 40
    before_the_first_ends = begun[: begun.index(Compute)]
    assert before_the_first_ends.count(Read) <= 1 + UNPACKING_BYTES // (2 * LARGE)  # and a table


def test_nobody_joins_a_read_of_what_lay_there_before() -> None:
    """Its cluster was freed and taken while another core decompressed it, which no Grace waits for."""
    geometry = Geometry.of(set_up(1 << 20, cluster_bits=16).image.header.record)
    old, new = b"o" * CLUSTER, b"n" * CLUSTER
    entry = Entries.of(geometry).descriptor(CLUSTER, len(deflate(old)))
    file = SimulatedFile.parse("disk", bytes(CLUSTER) + deflate(old))
    clusters = CompressedClusters(file, geometry, CompressionType.ZLIB, Statistics())
    driver, seen = CrashDriver(fault=lambda operation: take_over(operation)), list[bytes]()

    async def read() -> None:
        seen.append(bytes(await clusters.read(entry)))

    def take_over(operation: Operation) -> None:
        if isinstance(operation, Compute) and deflate(old) in file.content():
            file.write(CLUSTER, deflate(new))
            clusters.forget(entry)
            driver.spawn(read())

    assert len(deflate(old)) == len(deflate(new))
    driver.run(read())
    assert sorted(seen) == [new, old]
    assert clusters.is_at_hand(entry)
    driver.run(read())
    assert seen[-1] == new
