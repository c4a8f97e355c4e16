"""The records are as wide as the specification says, and the masks of an entry share its 64 bits out without a gap."""

import pytest

from qcow2.format import layout
from qcow2.format.layout import HeaderRecord, Incompatible
from qcow2.native import lib

WHOLE = (1 << 64) - 1


def test_records_have_their_widths() -> None:
    assert (HeaderRecord.V2.size, HeaderRecord.V3.size, HeaderRecord.V3_COMPRESSION.size) == (72, 104, 105)
    assert (layout.SnapshotRecord.FORMAT.size, layout.SNAPSHOT_EXTRA.size) == (40, 24)
    assert (layout.BitmapsRecord.FORMAT.size, layout.BitmapRecord.FORMAT.size) == (24, 24)
    assert (layout.FEATURE_NAME.size, layout.EXTENSION.size) == (48, 8)


@pytest.mark.parametrize(
    "masks",
    [
        (lib.ENTRY_OFFSET, lib.ENTRY_COPIED, lib.L1_ENTRY_RESERVED),
        (lib.ENTRY_OFFSET, lib.ENTRY_COPIED, lib.ENTRY_COMPRESSED, lib.ENTRY_ZERO, lib.ENTRY_RESERVED),
        (layout.REFCOUNT_TABLE_OFFSET_MASK, layout.REFCOUNT_TABLE_RESERVED),
        (layout.BITMAP_ENTRY_OFFSET_MASK, layout.BITMAP_ENTRY_ALL_ONES, layout.BITMAP_ENTRY_RESERVED),
    ],
)
def test_masks_cover_an_entry_once(masks: tuple[int, ...]) -> None:
    assert sum(masks) == WHOLE
    for mask in masks:
        assert sum(mask & other for other in masks) == mask


def test_a_known_flag_taken_out_leaves_the_unknown_ones() -> None:
    """`& ~FLAG` would not: CPython 3.11 forgets bits the enum has never heard of."""
    word = 1 << 63 | 1
    assert word ^ (word & int(Incompatible.DIRTY)) == 1 << 63
