"""Slices that the extent map loads itself: what it may, and what stays the engine's."""

import errno
from collections.abc import Callable
from typing import Any

import pytest

from qcow2.driver.operation import Operation, Read, Write
from qcow2.engine.image import Image
from qcow2.engine.opened import OpenOptions
from qcow2.native import ffi, lib
from tests.engine import Bench, noise, open_again, set_up
from tests.extents import BASE, DATA, FRESH, PUNT, TOP, ZERO, Plane, TableReader
from tests.pure.test_engine_extent_map import ask, patchwork, read_through

pytestmark = pytest.mark.pure

CLUSTER = 512
SLICE = 64 * CLUSTER  # guest bytes; also those of a table


def cold(bench: Bench, *, writable: bool = False) -> tuple[Bench, TableReader]:
    """The same files, in the page cache, in the hands of an image that has read none of its tables."""
    again = open_again(bench, writable=writable)
    again.image.set_slot(bench.file, TOP)
    return again, TableReader({TOP: bench.file})


def filled(nslices: int = 4, **options: Any) -> Bench:
    """A disk with data in the first cluster of each slice."""
    bench = set_up(nslices * SLICE, **options)
    for number in range(nslices):
        bench.write(number * SLICE, noise(CLUSTER, seed=number))
    bench.image.set_slot(bench.file, TOP)
    return bench


def native(bench: Bench) -> Any:
    return ffi.cast("struct l2map *", bench.image.extent_map.context_address)


def test_reads_of_a_map_that_loads_are_the_disk() -> None:
    bench = patchwork()
    again, tables = cold(bench)
    assert read_through(again, 0, bench.image.size, tables) == bench.content()
    assert len(tables.asked) == again.image.statistics.l2_loads > 0


def test_a_slice_is_loaded_once_and_the_engine_finds_it() -> None:
    again, tables = cold(filled())
    reads: list[Operation] = []
    again.breaker.fault = lambda operation: reads.append(operation) if isinstance(operation, Read) else None
    assert ask(again, 0, CLUSTER, tables=tables).kind == DATA
    assert ask(again, CLUSTER, CLUSTER, tables=tables).kind == ZERO
    assert again.read(0, CLUSTER) == noise(CLUSTER)
    assert len(tables.asked) == again.image.statistics.l2_loads == 1
    assert reads == []


def test_a_write_loads_the_slice_that_it_needs() -> None:
    bench = filled()
    bench.close()
    again, tables = cold(bench, writable=True)
    again.driver.run(again.image.discard(0, 0))  # before the first change no write is the data plane's
    assert ask(again, 0, CLUSTER, is_write=True, tables=tables).kind == DATA
    assert ask(again, SLICE + CLUSTER, CLUSTER, is_write=True, tables=tables).kind == FRESH


def test_the_slices_read_are_those_of_the_table() -> None:
    """Clusters of 64 KiB: sixteen slices a table."""
    bench = set_up(3 << 29, cluster_bits=16)
    bench.write((1 << 29) + 5 * 512 * 65536, b"x" * 512)
    again, tables = cold(bench)
    assert ask(again, (1 << 29) + 5 * 512 * 65536, 512, tables=tables).kind == DATA
    l1 = bench.image.header.record.l1_table_offset + 8
    table = int.from_bytes(bench.file.read(l1, 8), "big") & ((1 << 56) - 1)
    assert tables.asked == [(TOP, table + 5 * 4096, 4096)]


def test_a_table_that_is_not_in_the_page_cache_is_the_engines() -> None:
    bench = filled()
    again, _ = cold(bench)
    assert ask(again, 0, CLUSTER, tables=TableReader({TOP: bench.file}, lambda: True)).kind == PUNT
    assert again.read(0, CLUSTER) == noise(CLUSTER)
    assert again.image.statistics.l2_loads == 1


def test_a_table_past_the_end_of_the_file_is_the_engines() -> None:
    bench = filled()
    l1 = bench.image.header.record.l1_table_offset
    bench.file.resize(bench.file.size + 100)
    bench.file.write(l1, (bench.file.size // CLUSTER * CLUSTER).to_bytes(8, "big"))
    again, tables = cold(bench)
    assert ask(again, 0, CLUSTER, tables=tables).kind == PUNT
    assert again.read(0, CLUSTER) == bytes(CLUSTER)


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (1 << 63 | 1 << 56 | 512 * 4, "a reserved bit"),
        (1 << 63 | 512 * 4 | 2, "another reserved bit"),
        (1 << 63 | 512 * 10**6, "past the end of the file"),
    ],
)
def test_an_l1_entry_that_cannot_be_true_is_the_engines(entry: int, why: str) -> None:
    bench = filled()
    bench.file.write(bench.image.header.record.l1_table_offset, entry.to_bytes(8, "big"))
    again, tables = cold(bench)
    assert ask(again, 0, CLUSTER, tables=tables).kind == PUNT
    assert ask(again, SLICE, CLUSTER, tables=tables).kind == DATA
    assert len(tables.asked) == 1


def test_a_table_that_is_not_aligned_is_the_engines() -> None:
    bench = set_up(1 << 20, cluster_bits=12)
    bench.write(0, noise(512))
    l1 = bench.image.header.record.l1_table_offset
    entry = int.from_bytes(bench.file.read(l1, 8), "big")
    bench.file.write(l1, (entry + 512).to_bytes(8, "big"))
    again, tables = cold(bench)
    assert ask(again, 0, 512, tables=tables).kind == PUNT
    assert tables.asked == []


def test_a_table_that_a_snapshot_shares_can_be_read() -> None:
    bench = filled()
    l1 = bench.image.header.record.l1_table_offset
    entry = int.from_bytes(bench.file.read(l1, 8), "big")
    bench.file.write(l1, (entry & ~(1 << 63)).to_bytes(8, "big"))
    again, tables = cold(bench)
    assert ask(again, 0, CLUSTER, tables=tables).kind == DATA


def test_without_a_slot_nothing_is_loaded() -> None:
    again, tables = cold(filled())
    again.image.set_slot(again.file, None)
    assert ask(again, 0, CLUSTER, tables=tables).kind == PUNT
    assert tables.asked == []


def test_backing_images_load_their_slices_too() -> None:
    base = filled()
    base.close()
    base.file.writable = False
    top = set_up(4 * SLICE)
    backing = top.driver.run(Image.open(base.file))
    image = top.driver.run(Image.open(top.file, backing=backing, options=OpenOptions(writable=True)))
    image.set_slot(top.file, TOP)
    image.set_slot(base.file, BASE)
    both = Bench(top.driver, top.breaker, top.file, base.file, image)
    tables = TableReader({TOP: top.file, BASE: base.file})
    answer = ask(both, SLICE, CLUSTER, tables=tables)
    assert (answer.kind, answer.slot) == (DATA, BASE)
    assert base.file.read(answer.host_offset, CLUSTER) == noise(CLUSTER, seed=1)
    assert [slot for slot, _, _ in tables.asked] == [BASE]


def test_a_reader_that_gives_up_midway_leaves_a_shorter_answer() -> None:
    """Across slices whose data is in one piece: what is known is answered, the rest asked for again."""
    bench = set_up(4 * SLICE)
    bench.write(SLICE - CLUSTER, noise(2 * CLUSTER))
    again, _ = cold(bench)
    budget = iter([False])
    tables = TableReader({TOP: bench.file}, lambda: next(budget, True))
    assert ask(again, SLICE - CLUSTER, 2 * CLUSTER, tables=tables).nbytes == CLUSTER
    assert ask(again, SLICE, CLUSTER, tables=tables).kind == PUNT


def asked_during(bench: Bench, picked: Callable[[Operation], bool], question: Callable[[], Any]) -> list[Any]:
    """What *question* finds when an operation that is *picked* begins; the list fills later."""
    answers: list[Any] = []

    def look(operation: Operation) -> OSError | None:
        if picked(operation):
            answers.append(question())
        return None

    bench.breaker.fault = look
    return answers


def test_a_slice_that_the_engine_is_reading_is_left_to_it() -> None:
    again, tables = cold(filled())
    answers = asked_during(
        again,
        lambda operation: isinstance(operation, Read),
        lambda: [ask(again, number * SLICE, CLUSTER, tables=tables).kind for number in (0, 1)],
    )
    assert again.read(0, CLUSTER) == noise(CLUSTER)
    assert answers == [[PUNT, DATA]]


def test_a_slice_whose_reading_failed_may_be_loaded() -> None:
    again, tables = cold(filled())
    again.breaker.fault = lambda operation: OSError(errno.EIO, "as told") if isinstance(operation, Read) else None
    with pytest.raises(OSError):
        again.read(0, CLUSTER)
    assert ask(again, 0, CLUSTER, tables=tables).kind == DATA


def test_a_slice_with_an_entry_on_its_way_is_left_to_the_engine() -> None:
    bench = filled(nslices=80, cache_size=0)
    tables = TableReader({TOP: bench.file})

    def question() -> list[int]:
        for number in range(2, 80):  # the cache gives up what it had
            ask(bench, number * SLICE, CLUSTER, tables=tables)
        return [ask(bench, number * SLICE, CLUSTER, tables=tables).kind for number in (0, 1)]

    answers = asked_during(bench, lambda operation: isinstance(operation, Write) and not operation.data, question)
    bench.write(CLUSTER, noise(CLUSTER))
    assert answers == [[PUNT, DATA]]
    bench.breaker.fault = None
    assert ask(bench, 0, CLUSTER, tables=tables).kind == DATA


def waiting() -> tuple[Bench, TableReader, Plane]:
    """An overlay with a link that waits in the first slice, which the cache has given up since."""
    bench = set_up(80 * SLICE, base=noise(80 * SLICE, seed=9), log_capacity=64, cache_size=0)
    assert bench.base is not None
    plane = Plane(bench.driver, bench.image, bench.file, bench.base)
    for number in range(80):
        bench.write(number * SLICE, noise(CLUSTER, seed=number))
    bench.driver.run(bench.image.settle())
    bench.write(CLUSTER, noise(CLUSTER, seed=1000))
    tables = TableReader({TOP: bench.file, BASE: bench.base})
    for number in range(1, 80):
        assert ask(bench, number * SLICE, CLUSTER, tables=tables).kind == DATA
    return bench, tables, plane


def test_a_slice_with_a_link_that_waits_is_left_to_the_engine() -> None:
    bench, tables, _ = waiting()
    assert ask(bench, 2 * CLUSTER, CLUSTER, tables=tables).kind == PUNT
    assert bench.read(CLUSTER, CLUSTER) == noise(CLUSTER, seed=1000)


def test_a_slice_whose_links_are_in_the_file_may_be_loaded() -> None:
    bench, tables, _ = waiting()
    bench.driver.run(bench.image.settle())
    for number in range(1, 80):
        ask(bench, number * SLICE, CLUSTER, tables=tables)
    loads = bench.image.statistics.l2_loads
    answer = ask(bench, CLUSTER, CLUSTER, tables=tables)
    assert (answer.kind, answer.slot) == (DATA, TOP)
    assert bench.image.statistics.l2_loads == loads + 1


def test_a_slice_with_a_link_that_the_engine_has_not_heard_of_is_left_to_it() -> None:
    bench, tables, plane = waiting()
    bench.driver.run(bench.image.settle())
    assert ask(bench, 0, CLUSTER, tables=tables).kind == DATA
    assert plane.write(2 * CLUSTER, noise(CLUSTER, seed=1001))
    for number in range(1, 80):
        assert ask(bench, number * SLICE, CLUSTER, tables=tables).kind == DATA
    assert ask(bench, 2 * CLUSTER, CLUSTER, tables=tables).kind == PUNT
    assert bench.read(2 * CLUSTER, CLUSTER) == noise(CLUSTER, seed=1001)


def test_a_claim_is_taken_back_as_often_as_it_was_made() -> None:
    again, tables = cold(filled())
    l2map = native(again)
    for expected in (PUNT, PUNT):
        lib.l2map_claim(l2map, 0)
        assert ask(again, 0, CLUSTER, tables=tables).kind == expected
    lib.l2map_unclaim(l2map, 0)
    assert ask(again, 0, CLUSTER, tables=tables).kind == PUNT
    lib.l2map_unclaim(l2map, 0)
    assert ask(again, 0, CLUSTER, tables=tables).kind == DATA
