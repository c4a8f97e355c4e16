"""Images that contradict themselves where no open looks: what is written to them ends in an error, never in worse."""

import struct

import pytest

from qcow2.error import CorruptImage
from qcow2.format import layout
from tests.builder.record import COMPRESSED, COPIED, OFFSET_MASK
from tests.engine import Bench, open_again, set_up

pytestmark = pytest.mark.pure

CLUSTER = 512


def closed_bench(nclusters: int, *, refcount_order: int = 4) -> Bench:
    """A closed image with data in its first *nclusters* clusters."""
    bench = set_up(1000 * CLUSTER, refcount_order=refcount_order)
    for cluster in range(nclusters):
        bench.write(cluster * CLUSTER, b"x" * CLUSTER)
    bench.close()
    return bench


def header(bench: Bench) -> layout.HeaderRecord:
    return layout.HeaderRecord.parse(bench.file.read(0, 112))


def peek(bench: Bench, host_offset: int) -> int:
    return int.from_bytes(bench.file.read(host_offset, 8), "big")


def poke(bench: Bench, host_offset: int, entry: int) -> None:
    bench.file.write(host_offset, struct.pack(">Q", entry))


def test_cluster_that_no_refcount_block_counts_can_be_let_go() -> None:
    bench = closed_bench(600)
    poke(bench, header(bench).refcount_table_offset + layout.ENTRY_SIZE, 0)
    before = bench.file.read(0, CLUSTER)
    bench = open_again(bench, writable=True)
    bench.driver.run(bench.image.discard(300 * CLUSTER, CLUSTER))
    bench.write(0, b"y" * CLUSTER)
    expected = bytearray(b"x" * 600 * CLUSTER + bytes(400 * CLUSTER))
    expected[:CLUSTER], expected[300 * CLUSTER : 301 * CLUSTER] = b"y" * CLUSTER, bytes(CLUSTER)
    assert bench.file.read(0, CLUSTER) == before  # offset 0 of the table is no block, least of all the header
    with pytest.raises(CorruptImage):  # an L2 table is not counted either
        bench.write(700 * CLUSTER, b"y" * CLUSTER)
    assert bench.content() == expected


def test_cluster_past_what_the_refcount_table_can_count_can_be_let_go() -> None:
    bench = closed_bench(1, refcount_order=6)
    countable = 64 * 64  # a table of one cluster, of blocks that count 64 clusters each
    bench.file.resize((countable + 100) * CLUSTER)
    l2_offset = peek(bench, header(bench).l1_table_offset) & OFFSET_MASK
    poke(bench, l2_offset, (countable + 50) * CLUSTER | COPIED)
    bench = open_again(bench, writable=True)
    bench.driver.run(bench.image.discard(0, CLUSTER))
    bench.write(0, b"y" * CLUSTER)
    assert bench.content() == b"y" * CLUSTER + bytes(999 * CLUSTER)
    bench.close()


def test_table_without_its_copied_flag_is_replaced_and_its_cluster_used_again() -> None:
    """A writer that died while it deleted a snapshot leaves counts of one and flags that say otherwise."""
    bench = closed_bench(20)
    where = header(bench).l1_table_offset
    old = peek(bench, where) & OFFSET_MASK
    poke(bench, where, old)
    bench = open_again(bench, writable=True)
    for cluster in range(900):
        bench.write(cluster * CLUSTER, b"y" * CLUSTER)
    assert bench.content() == b"y" * 900 * CLUSTER + bytes(100 * CLUSTER)
    assert bench.file.read(old, CLUSTER) == b"y" * CLUSTER


def test_uncounted_reference_past_the_end_does_not_meet_what_the_file_grows_by() -> None:
    bench = closed_bench(1)
    end = bench.file.size
    l2_offset = peek(bench, header(bench).l1_table_offset) & OFFSET_MASK
    poke(bench, l2_offset, end + 10 * CLUSTER | COPIED)
    bench = open_again(bench, writable=True)
    for cluster in range(5, 50):
        bench.write(cluster * CLUSTER, b"y" * CLUSTER)
    assert bench.read(0, CLUSTER) == bytes(CLUSTER)  # not what somebody else has written there
    bench.write(0, b"x")
    assert bench.read(5 * CLUSTER, 45 * CLUSTER) == b"y" * 45 * CLUSTER
    bench.close()


def test_compressed_data_that_is_none_fails_the_read() -> None:
    bench = closed_bench(1)
    l2_offset = peek(bench, header(bench).l1_table_offset) & OFFSET_MASK
    data = peek(bench, l2_offset) & OFFSET_MASK
    poke(bench, l2_offset, COMPRESSED | data)
    bench = open_again(bench)
    with pytest.raises(CorruptImage):
        bench.read(0, CLUSTER)


def test_compressed_cluster_with_a_table_in_its_middle_is_refused() -> None:
    bench = set_up(1024 * 4096, cluster_bits=12)
    for cluster in (0, 1, 600):  # the table of the last one comes to lie between data
        bench.write(cluster * 4096, b"x")
    bench.close()
    first, second = (peek(bench, header(bench).l1_table_offset + at) & OFFSET_MASK for at in (0, 8))
    poke(bench, first, COMPRESSED | 15 << 58 | second - 512)  # 16 sectors, from the last before the table
    bench = open_again(bench, writable=True)
    with pytest.raises(CorruptImage):
        bench.driver.run(bench.image.discard(0, 4096))


def test_image_that_is_refused_for_writing_is_untouched() -> None:
    bench = closed_bench(1)
    poke(bench, layout.HEADER_AUTOCLEAR_OFFSET, 1 << 5)
    poke(bench, header(bench).refcount_table_offset + layout.ENTRY_SIZE, 0x201)
    before = dict(bench.file.sectors)
    with pytest.raises(CorruptImage):
        open_again(bench, writable=True)
    assert bench.file.sectors == before
