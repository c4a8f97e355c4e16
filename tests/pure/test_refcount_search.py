"""Free clusters are looked for a word at a time; what is found is what one entry at a time finds."""

import random

import pytest

from qcow2.native import ffi, lib

NBYTES = 64


def random_block(rng: random.Random) -> bytearray:
    """Long runs of full or of empty entries, with a few bytes that are neither."""
    block = bytearray([rng.choice([0, 1, 128, 255])] * NBYTES)
    for _ in range(rng.choice([0, 1, 2, 5])):
        block[rng.randrange(NBYTES)] = rng.choice([0, 1, 128, 255, rng.randrange(256)])
    return block


@pytest.mark.parametrize("order", range(7))
def test_a_word_at_a_time_finds_what_an_entry_at_a_time_does(order: int) -> None:
    rng = random.Random(order)
    nentries = NBYTES * 8 >> order
    for _ in range(300):
        block = random_block(rng)
        view = ffi.from_buffer("uint8_t[]", block)
        counts = [lib.refcount_get(view, order, index) for index in range(nentries)]
        first = rng.randrange(nentries + 1)
        end = rng.randrange(first, nentries + 1)
        for nonzero in (0, 1):
            wanted = next((i for i in range(first, end) if bool(counts[i]) == bool(nonzero)), end)
            assert lib.refcount_find(view, order, first, end, nonzero) == wanted, (block, first, end)
        assert lib.refcount_used(view, order, end) == max((i + 1 for i in range(end) if counts[i]), default=0)
