"""Images with subclusters, by engine and extent map in turns, against a model; what a kill leaves in the link log."""

import random
from dataclasses import replace
from typing import Any

import pytest

from qcow2.engine.replay import replay
from qcow2.format.header import read_header
from qcow2.format.layout import HEADER_SIZE, HEADER_SIZE_OFFSET
from tests.engine import Bench, open_again, set_up, waiting
from tests.extents import DISCARD, KEEP, UNMAP, UNTOUCHED, Plane, clear_by, write_by

BITS = 14
CLUSTER, UNIT = 1 << BITS, 1 << BITS - 5
NCLUSTERS = 20
SIZE = NCLUSTERS * CLUSTER - 3 * 512


def started(**options: Any) -> tuple[Bench, Plane, bytearray]:
    """An image that the extent map knows, what it shows first, and a table and clusters in stock."""
    bench = set_up(SIZE, cluster_bits=BITS, has_subclusters=True, log_capacity=200, **options)
    plane = Plane(bench.driver, bench.image, bench.file, bench.base)
    model = bytearray((options.get("base") or b"").ljust(SIZE, b"\0")[:SIZE])
    put(bench, model, 0, b"first")
    return bench, plane, model


def put(bench: Bench, model: bytearray, offset: int, data: bytes) -> None:
    data = data.ljust(512, b".")
    bench.write(offset, data)
    model[offset : offset + len(data)] = data


def clear(bench: Bench, plane: Plane | None, model: bytearray, offset: int, nbytes: int, how: int) -> bool:
    served = clear_by(plane, bench, offset, nbytes, how)
    if how == DISCARD:
        seen, old = bench.read(offset, nbytes), model[offset : offset + nbytes]
        for at in range(0, nbytes, 512):
            assert seen[at : at + 512] in (old[at : at + 512], bytes(512))
        model[offset : offset + nbytes] = seen
    else:
        model[offset : offset + nbytes] = bytes(nbytes)
    return served


def change(bench: Bench, plane: Plane, model: bytearray, draw: random.Random) -> bool:
    """One change by either of them; whether the extent map made it."""
    served = draw.random() < 0.7
    step = draw.choice([512, UNIT, UNIT])
    offset = draw.randrange(SIZE // step) * step
    nbytes = min(draw.randint(1, draw.choice([2, 8, 40])) * step, SIZE - offset)
    what = draw.random()
    if what < 0.25:
        how = draw.choice([DISCARD, UNMAP, KEEP])
        if draw.random() < 0.3:
            offset -= offset % CLUSTER
            nbytes = min(CLUSTER, SIZE - offset)
        return clear(bench, plane if served else None, model, offset, nbytes, how)
    nbytes = min(nbytes, CLUSTER - offset % CLUSTER) if draw.random() < 0.8 else nbytes
    data = draw.randbytes(nbytes)
    served = write_by(plane if served else None, bench, offset, data)
    model[offset : offset + nbytes] = data
    return served


@pytest.mark.parametrize("base", [None, random.Random(0).randbytes(9 * CLUSTER + 512)], ids=["alone", "overlay"])
@pytest.mark.parametrize("seed", range(4))
def test_engine_and_extent_map_keep_one_disk(seed: int, base: bytes | None) -> None:
    bench, plane, model = started(base=base, seed=seed, lazy=seed % 2 == 1, cache_size=1 << 20)
    draw = random.Random(seed)
    served = 0
    for number in range(300):
        served += change(bench, plane, model, draw)
        if number % 20 == 0:
            assert bench.content() == model
            assert plane.read(0, CLUSTER) in (None, model[:CLUSTER])
        if number % 50 == 25:
            bench.driver.run(bench.image.flush())
    assert served > 60
    assert bench.content() == model
    bench.close()
    assert bench.reopened_content() == model
    bench.assert_sound()


@pytest.mark.parametrize("seed", range(4))
def test_what_waits_at_a_kill_is_replayed(seed: int) -> None:
    base = random.Random(1).randbytes(NCLUSTERS * CLUSTER)
    bench, plane, model = started(base=base, seed=seed)
    draw = random.Random(seed)
    for number in range(60):
        change(bench, plane, model, draw)
        if number % 25 == 0:
            bench.driver.run(bench.image.flush())
    file, links = bench.file, waiting(bench.file)
    assert links is not None
    outcome = bench.driver.run(replay_of(bench, links))
    assert outcome.dropped == 0
    assert bench.reopened_content() == model
    assert file is bench.file


async def replay_of(bench: Bench, links: Any) -> Any:
    return await replay(bench.file, await read_header(bench.file, trust_refcounts=False), links)


def entry_words(bench: Bench, cluster: int) -> tuple[int, int]:
    run = bench.driver.run(bench.image.resolve(cluster * CLUSTER, 1))
    return run.entry & (1 << 64) - 1, run.entry >> 64


def test_a_write_to_a_part_of_a_cluster_writes_the_part_and_the_entry() -> None:
    base = random.Random(1).randbytes(NCLUSTERS * CLUSTER)
    bench, plane, model = started(base=base)
    assert plane.write(2 * CLUSTER + UNIT, b"x" * 512)
    assert plane.write(2 * CLUSTER + 5 * UNIT, b"y" * UNIT), "its own cluster, whose link waits"
    assert plane.write(2 * CLUSTER + 5 * UNIT, b"z" * UNIT), "in place"
    word, bitmap = entry_words(bench, 2)
    assert bitmap == 1 << 1 | 1 << 5
    assert plane.clear(2 * CLUSTER + 5 * UNIT, UNIT, KEEP) is False, "its link waits"
    bench.driver.run(bench.image.flush())
    assert plane.clear(2 * CLUSTER + 5 * UNIT, UNIT, KEEP)
    assert entry_words(bench, 2) == (word, 1 << 1 | 1 << 32 + 5)
    clear(bench, plane, model, 2 * CLUSTER + UNIT, UNIT, UNMAP)
    assert entry_words(bench, 2) == (0, (1 << 1 | 1 << 5) << 32), "nothing is left in its cluster"


def test_copies_send_one_write_to_the_engine_before_their_stock_is_empty() -> None:
    size = 1024 * CLUSTER
    base = random.Random(1).randbytes(CLUSTER) * 1024
    bench = set_up(size, cluster_bits=BITS, has_subclusters=True, log_capacity=200, base=base)
    plane = Plane(bench.driver, bench.image, bench.file, bench.base)
    bench.write(0, b"w" * UNIT)
    sent = 0
    for cluster in range(1, 500):
        if cluster % 50 == 0:
            bench.driver.run(bench.image.flush())
        if not plane.write(cluster * CLUSTER, b"x" * UNIT):
            sent += 1
            next_one = plane.take((cluster + 1) * CLUSTER, UNIT)
            assert next_one is not None, "others that are under way need not enter Python"
            plane.conclude(next_one, UNTOUCHED)
            bench.write(cluster * CLUSTER, b"x" * UNIT)
    assert 2 < sent < 15
    bench.close()
    bench.assert_sound()


def test_a_fresh_cluster_with_nothing_below_is_the_guests_as_a_whole() -> None:
    bench, plane, _ = started()
    assert plane.write(2 * CLUSTER + 512, b"x" * 512)
    assert entry_words(bench, 2)[1] == 0xFFFFFFFF


def test_what_a_kept_cluster_held_past_the_end_of_the_disk_is_not_named() -> None:
    cluster, unit = 1 << 16, 1 << 11
    bench = set_up(2 * cluster, cluster_bits=16, has_subclusters=True, log_capacity=200)
    last = cluster + 3 * unit
    bench.write(0, b"s" * 2 * cluster)
    bench.driver.run(bench.image.write_zeroes(cluster + unit, cluster - unit, unmap=False))
    bench.driver.run(bench.image.shrink(last + 512))
    plane = Plane(bench.driver, bench.image, bench.file, bench.base)
    bench.write(last - unit, b"w" * unit)  # so that the table is in memory, and a stock
    assert plane.write(last - 2 * unit, b"w" * unit)
    assert not write_by(plane, bench, last, b"w" * 512)
    bench.close()
    with_more = bench.file.copy()
    with_more.write(HEADER_SIZE_OFFSET, HEADER_SIZE.pack(2 * cluster))  # as QEMU grows it
    longer = open_again(replace(bench, file=with_more))
    assert longer.read(last, unit) == (b"w" * 512).ljust(unit, b"\0")
