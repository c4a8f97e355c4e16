"""Decompression: whatever the stream, a cluster or a clear refusal, in bounded memory."""

import contextlib
import zlib

import pytest
import zstandard

from qcow2.compressed import Payload, inflate, unpack_zstd
from qcow2.geometry import Geometry
from tests.engine import noise, set_up

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
    parameters = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=False)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    packed = packer.compress(TEXT) + packer.flush()
    with pytest.raises(ValueError, match=r"memory|window|Frame"):
        unpack_zstd(packed, CLUSTER)


@pytest.mark.parametrize("cluster_bits", [9, 16, 21])
def test_a_payload_reaches_to_the_end_of_its_last_sector(cluster_bits: int) -> None:
    geometry = Geometry.of(set_up(1 << 20, cluster_bits=cluster_bits).image.header.record)
    shift = 62 - (cluster_bits - 8)
    payload = Payload.of(1 << 62 | 1 << shift | (3 << cluster_bits) + 100, geometry)
    assert payload == Payload((3 << cluster_bits) + 100, 1024 - 100)
    assert payload.host_clusters(geometry) == (range(3, 5) if cluster_bits == 9 else range(3, 4))
