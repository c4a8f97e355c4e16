"""The extent map: what C answers alone is what the engine would have done, and no more."""

import errno
import random
from typing import NamedTuple

import pytest

from qcow2.error import CorruptImage
from qcow2.native import ffi, lib
from tests.crash.driver import SimulatedFile
from tests.engine import Bench, noise, open_again, set_up
from tests.extents import TableReader

pytestmark = pytest.mark.pure

PUNT, DATA, ZERO, FRESH = 0, 1, 2, 3
TOP, BASE = 3, 5  # slots
CLUSTER = 512


class Answer(NamedTuple):
    kind: int
    slot: int
    host_offset: int
    nbytes: int


def ask(
    bench: Bench, guest_offset: int, nbytes: int, *, is_write: bool = False, tables: TableReader | None = None
) -> Answer:
    """Call the map as the worker does: through its two addresses, lending it *tables*."""
    address, context, _ = bench.image.extent_map
    out = ffi.new("struct extent *")
    reader = ffi.NULL if tables is None else tables.native
    ffi.cast("extent_translate", address)(ffi.cast("void *", context), guest_offset, nbytes, is_write, reader, out)
    return Answer(out.kind, out.slot, out.host_offset, out.nbytes)


def patchwork(*, base: bytes | None = None, seed: int = 0) -> Bench:
    """An image with a bit of everything, all of its slices in memory, its files registered."""
    bench = set_up(400 * CLUSTER, seed=seed, base=base)
    rng = random.Random(seed)
    for _ in range(60):
        first, count = rng.randrange(390), rng.randrange(1, 9)
        match rng.randrange(4):
            case 0 | 1:
                bench.write(first * CLUSTER, noise(count * CLUSTER, seed=first))
            case 2:
                bench.driver.run(bench.image.write_zeroes(first * CLUSTER, count * CLUSTER, unmap=False))
            case 3:
                bench.driver.run(bench.image.discard(first * CLUSTER, count * CLUSTER))
    bench.content()
    bench.image.set_slot(bench.file, TOP)
    if bench.base:
        bench.image.set_slot(bench.base, BASE)
    return bench


def read_through(bench: Bench, guest_offset: int, nbytes: int, tables: TableReader | None = None) -> bytes:
    """What a data plane reads that follows the answers."""
    content = b""
    while len(content) < nbytes:
        answer = ask(bench, guest_offset + len(content), nbytes - len(content), tables=tables)
        assert 0 < answer.nbytes <= nbytes - len(content)
        files: dict[int, SimulatedFile | None] = {TOP: bench.file, BASE: bench.base}
        match answer.kind:
            case 1:
                file = files[answer.slot]
                assert file is not None
                content += file.read(answer.host_offset, answer.nbytes)
            case 2:
                content += bytes(answer.nbytes)
            case _:
                raise AssertionError(f"punted at {guest_offset + len(content)}")
    return content


@pytest.mark.parametrize("base", [None, noise(300 * CLUSTER + 100)], ids=["alone", "overlay"])
def test_reads_that_c_serves_are_the_disk(base: bytes | None) -> None:
    bench = patchwork(base=base)
    content = bench.content()
    rng = random.Random(1)
    for _ in range(300):
        start = rng.randrange(len(content))
        nbytes = rng.randrange(1, len(content) - start + 1)
        assert read_through(bench, start, nbytes) == content[start : start + nbytes]


def test_writes_are_answered_only_where_overwriting_is_all() -> None:
    bench = patchwork()
    for cluster in range(400):
        run = bench.driver.run(bench.image.resolve(cluster * CLUSTER, CLUSTER))
        answer = ask(bench, cluster * CLUSTER, CLUSTER, is_write=True)
        in_place = run.kind == 4 and run.copied
        assert answer.kind == (DATA if in_place else FRESH if run.kind in (1, 2) else PUNT)
        if in_place:
            assert answer == (DATA, TOP, run.host_offset, CLUSTER)


def test_neighbours_in_the_file_are_one_extent_across_slices() -> None:
    bench = set_up(400 * CLUSTER)
    bench.write(0, noise(8 * CLUSTER))
    bench.image.set_slot(bench.file, TOP)
    assert ask(bench, 100, 7 * CLUSTER).nbytes == 7 * CLUSTER
    assert ask(bench, 8 * CLUSTER, 380 * CLUSTER) == (ZERO, 0, 0, 380 * CLUSTER)


def test_a_table_that_is_not_in_memory_is_punted() -> None:
    bench = patchwork()
    cold = bench.driver.run(type(bench.image).open(bench.file))
    cold.set_slot(bench.file, TOP)
    assert ask(Bench(bench.driver, bench.breaker, bench.file, None, cold), 0, CLUSTER).kind == PUNT


def test_without_a_slot_data_is_punted() -> None:
    bench = patchwork()
    bench.write(0, noise(CLUSTER))
    bench.image.set_slot(bench.file, None)
    assert ask(bench, 0, CLUSTER).kind == PUNT


def test_a_failed_image_answers_reads_and_no_writes() -> None:
    bench = patchwork()
    bench.write(0, noise(CLUSTER))
    assert ask(bench, 0, CLUSTER, is_write=True).kind == DATA
    bench.image.fail(OSError(errno.EIO, "as told"))
    assert ask(bench, 0, CLUSTER, is_write=True).kind == PUNT
    assert ask(bench, 0, CLUSTER).kind == DATA
    bench.image.set_slot(bench.file, TOP)
    assert ask(bench, 0, CLUSTER, is_write=True).kind == PUNT


def test_past_the_end_of_the_disk_everything_is_punted() -> None:
    bench = patchwork()
    size = bench.image.size
    assert ask(bench, size, 1) == (PUNT, 0, 0, 1)
    assert ask(bench, size - CLUSTER, CLUSTER + 1).kind == PUNT
    assert ask(bench, (1 << 64) - CLUSTER, CLUSTER).kind == PUNT


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (1 << 63 | 512 * 10**6, "past the end of the file"),
        (1 << 63 | 512 | 1 << 56, "a reserved bit"),
        (1 << 63 | 512 | 2, "another reserved bit"),
        (1 << 63 | 0x200, "the header's neighbour, the refcount table"),
        (1 << 62 | 1 << 40, "compressed, past the end of the file"),
    ],
)
def test_an_entry_that_cannot_be_true_is_punted(entry: int, why: str) -> None:
    bench = patchwork()
    bench.write(0, noise(CLUSTER))
    l1_offset = bench.image.header.record.l1_table_offset
    table = int.from_bytes(bench.file.read(l1_offset, 8), "big") & ((1 << 56) - 1)
    bench.file.write(table, entry.to_bytes(8, "big"))
    bench = open_again(bench, writable=True)
    bench.image.set_slot(bench.file, TOP)
    with pytest.raises(CorruptImage) as caught:
        bench.read(0, CLUSTER)
    assert caught.value.host_offset == table
    assert bench.read(CLUSTER, CLUSTER) is not None
    assert ask(bench, 0, CLUSTER).kind == PUNT
    assert ask(bench, 0, CLUSTER, is_write=True).kind == PUNT


def test_the_raw_map_is_the_identity() -> None:
    out = ffi.new("struct extent *")
    rawmap = ffi.new("struct rawmap *", {"size": 1000, "slot": 2, "writable": 0})
    lib.rawmap_translate(rawmap, 100, 900, 0, ffi.NULL, out)
    assert (out.kind, out.slot, out.host_offset, out.nbytes) == (DATA, 2, 100, 900)
    lib.rawmap_translate(rawmap, 100, 900, 1, ffi.NULL, out)
    assert out.kind == PUNT
    lib.rawmap_translate(rawmap, 100, 901, 0, ffi.NULL, out)
    assert out.kind == PUNT
