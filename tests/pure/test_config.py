"""The configuration space and the feature bits against the specification's tables."""

import struct

import pytest

from virtio.config import BlockConfig, Properties, block_config, read_window
from virtio.feature import BlockFeature, RingFeature, caches_writes, offered_features, unknown_bits

GIB = 1 << 30
DISK = Properties(size=10 * GIB, optimal_io_size=65536)

# virtio 1.2, 5.2.4, field by field: name, offset, struct format, value for DISK with 4 queues and wce on
FIELDS = [
    ("capacity", 0, "<Q", 10 * GIB // 512),
    ("size_max", 8, "<I", 0),
    ("seg_max", 12, "<I", 126),
    ("geometry.cylinders", 16, "<H", 0),
    ("geometry.heads", 18, "<B", 0),
    ("geometry.sectors", 19, "<B", 0),
    ("blk_size", 20, "<I", 512),
    ("topology.physical_block_exp", 24, "<B", 3),
    ("topology.alignment_offset", 25, "<B", 0),
    ("topology.min_io_size", 26, "<H", 8),
    ("topology.opt_io_size", 28, "<I", 128),
    ("writeback", 32, "<B", 1),
    ("unused0", 33, "<B", 0),
    ("num_queues", 34, "<H", 4),
    ("max_discard_sectors", 36, "<I", 32768),
    ("max_discard_seg", 40, "<I", 1),
    ("discard_sector_alignment", 44, "<I", 128),
    ("max_write_zeroes_sectors", 48, "<I", 32768),
    ("max_write_zeroes_seg", 52, "<I", 1),
    ("write_zeroes_may_unmap", 56, "<B", 1),
]


@pytest.mark.parametrize(("name", "offset", "layout", "value"), FIELDS, ids=[field[0] for field in FIELDS])
def test_field_is_where_the_specification_puts_it(name: str, offset: int, layout: str, value: int) -> None:
    space = block_config(DISK, num_queues=4, wce=True).pack()
    assert struct.unpack_from(layout, space, offset) == (value,)


def test_space_ends_after_write_zeroes_may_unmap() -> None:
    assert BlockConfig.LAYOUT.size == 57


def test_read_only_disk_has_nothing_to_discard_or_zero() -> None:
    config = block_config(Properties(size=GIB, read_only=True), num_queues=1, wce=True)
    assert (config.max_discard_sectors, config.max_write_zeroes_sectors, config.write_zeroes_may_unmap) == (0, 0, 0)


def test_large_blocks_are_their_own_physical_blocks() -> None:
    config = block_config(Properties(size=GIB, block_size=4096), num_queues=1, wce=True)
    assert (config.blk_size, config.physical_block_exp, config.min_io_size) == (4096, 0, 1)


@pytest.mark.parametrize("start", [0, 1, 55, 56, 57, 58, 255, 2**32 - 1])
@pytest.mark.parametrize("nbytes", [0, 1, 57, 60, 256])
def test_window_reads_zeros_beyond_the_space(start: int, nbytes: int) -> None:
    space = bytes(range(1, 58))
    endless = space + bytes(1024)
    assert read_window(space, start, nbytes) == (endless[start : start + nbytes] if start < 512 else bytes(nbytes))


def test_unknown_bits_include_those_no_enum_has_heard_of() -> None:
    assert unknown_bits(RingFeature.VERSION_1 | 1 << 63 | 1 << 40, RingFeature.VERSION_1) == 1 << 63 | 1 << 40


def test_read_only_device_offers_neither_discard_nor_write_zeroes_nor_wce() -> None:
    offered = offered_features(read_only=True)
    assert offered & BlockFeature.RO
    assert not offered & (BlockFeature.DISCARD | BlockFeature.WRITE_ZEROES | BlockFeature.CONFIG_WCE)


def test_writable_device_offers_what_the_issue_lists() -> None:
    bits = {bit for bit in range(64) if offered_features(read_only=False) >> bit & 1}
    assert bits == {2, 6, 9, 10, 11, 12, 13, 14, 28, 29, 32, 34}


FLUSH, WCE = BlockFeature.FLUSH, BlockFeature.CONFIG_WCE


@pytest.mark.parametrize(
    ("features", "wce", "writeback", "expected"),
    [
        (0, True, True, False),
        (0, False, False, False),
        (WCE, True, True, False),  # it could never flush
        (FLUSH, True, True, True),
        (FLUSH, False, True, True),  # such a driver does not know the byte
        (FLUSH, True, False, False),
        (FLUSH | WCE, True, False, True),
        (FLUSH | WCE, False, True, False),
    ],
)
def test_cache_rule(features: int, wce: bool, writeback: bool, expected: bool) -> None:
    assert caches_writes(features, wce=wce, writeback=writeback) is expected
