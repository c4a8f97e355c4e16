"""The records are as wide as the specification says, and the masks of an entry share its 64 bits out without a gap."""

import pytest

from qcow2.format import layout
from qcow2.format.layout import CompressedMasks, HeaderRecord, Incompatible

WHOLE = (1 << 64) - 1


def test_records_have_their_widths() -> None:
    assert (HeaderRecord.V2.size, HeaderRecord.V3.size, HeaderRecord.V3_COMPRESSION.size) == (72, 104, 105)
    assert (layout.SnapshotRecord.FORMAT.size, layout.SNAPSHOT_EXTRA.size) == (40, 24)
    assert (layout.BitmapsRecord.FORMAT.size, layout.BitmapRecord.FORMAT.size) == (24, 24)
    assert (layout.FEATURE_NAME.size, layout.EXTENSION.size) == (48, 8)


@pytest.mark.parametrize(
    "masks",
    [
        (layout.OFFSET_MASK, layout.COPIED, layout.L1_RESERVED),
        (layout.OFFSET_MASK, layout.COPIED, layout.L2_COMPRESSED, layout.L2_ZERO, layout.L2_RESERVED),
        (layout.REFCOUNT_TABLE_OFFSET_MASK, layout.REFCOUNT_TABLE_RESERVED),
        (layout.BITMAP_ENTRY_OFFSET_MASK, layout.BITMAP_ENTRY_ALL_ONES, layout.BITMAP_ENTRY_RESERVED),
    ],
)
def test_masks_cover_an_entry_once(masks: tuple[int, ...]) -> None:
    assert sum(masks) == WHOLE
    for mask in masks:
        assert sum(mask & other for other in masks) == mask


@pytest.mark.parametrize("cluster_bits", range(9, 22))
def test_compressed_masks_fill_62_bits(cluster_bits: int) -> None:
    masks = CompressedMasks.of(cluster_bits)
    assert masks.offset_mask | masks.sectors_mask << masks.sectors_shift == (1 << 62) - 1
    assert masks.sectors_mask + 1 == 1 << cluster_bits - 8  # room for a cluster and the sector it may begin in


def test_a_known_flag_taken_out_leaves_the_unknown_ones() -> None:
    """`& ~FLAG` would not: CPython 3.11 forgets bits the enum has never heard of."""
    word = 1 << 63 | 1
    assert word ^ (word & int(Incompatible.DIRTY)) == 1 << 63
