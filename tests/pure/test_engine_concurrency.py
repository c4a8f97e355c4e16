"""Requests under way at the same time, completing in any order: each sector holds what some order allows."""

import random

import pytest

from qcow2.driver import operation as op
from qcow2.driver.buffer import MemoryBuffer
from tests.crash.history import SECTOR, History
from tests.crash.workload import Guest, random_steps
from tests.engine import Bench, noise, open_again, set_up

pytestmark = pytest.mark.pure

SHAPES = {
    "512": {"size": 300 * 512},
    "512 lazy": {"size": 300 * 512, "lazy": True},
    "512 overlay": {"size": 300 * 512, "base": noise(200 * 512 + 100)},
    "4096 lazy overlay": {"size": 160 * 4096 + 512, "cluster_bits": 12, "lazy": True, "base": noise(100 * 4096)},
    "wide refcounts": {"size": 3000 * 512, "refcount_order": 6},
}


def assert_allowed(bench: Bench, history: History, content: bytes) -> None:
    for sector in range(len(content) // SECTOR):
        found = content[sector * SECTOR : (sector + 1) * SECTOR]
        assert found in history.allowed(sector, len(bench.driver.journal), power=False), f"sector {sector}"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", SHAPES)
def test_random_workloads_read_back_and_survive_a_reopen(shape: str, seed: int) -> None:
    bench = set_up(seed=seed, **SHAPES[shape])
    base = bench.base.content() if bench.base else b""
    history = History(base[: bench.image.size].ljust(bench.image.size, b"\0"))
    guest = Guest(bench.driver, bench.image, history)
    nsectors, cluster_sectors = bench.image.size // SECTOR, bench.image.geometry.cluster_size // SECTOR
    for step in random_steps(seed, nsectors, cluster_sectors, steps=15, depth=8):
        for action in step:
            bench.driver.spawn(guest.act(action))
        bench.driver.finish()
        assert_allowed(bench, history, bench.content())
    bench.close()
    assert not guest.failures
    assert_allowed(bench, history, bench.reopened_content())


def test_a_cluster_written_by_many_at_once_is_allocated_once() -> None:
    bench = set_up(1 << 20, cluster_bits=16)
    for sector in range(128):
        data = MemoryBuffer(memoryview(bytes([sector + 1]) * 512))
        bench.driver.spawn(bench.image.write(sector * 512, data))
    bench.driver.finish()
    assert bench.image.statistics.clusters_allocated == 1
    assert bench.read(0, 65536) == b"".join(bytes([sector + 1]) * 512 for sector in range(128))


def test_a_slice_wanted_by_many_at_once_is_read_once() -> None:
    bench = set_up(1 << 20, cluster_bits=12)
    for cluster in range(256):
        bench.write(cluster << 12, b"x")
    image = bench.image
    cold = open_again(bench)
    for cluster in range(256):
        cold.driver.spawn(cold.image.read(cluster << 12, MemoryBuffer(memoryview(bytearray(512)))))
    cold.driver.finish()
    assert image.geometry.slice_bytes == 4096
    assert cold.image.statistics.l2_loads == 1


def test_a_small_cache_forgets_and_reads_again() -> None:
    bench = set_up(4000 * 512, cache_size=0)
    for cluster in range(0, 4000, 3):
        bench.write(cluster * 512, cluster.to_bytes(4, "big") * 128)
    for cluster in range(0, 4000, 3):
        assert bench.read(cluster * 512, 512) == cluster.to_bytes(4, "big") * 128


class OldestLast(random.Random):
    """Lets the oldest operation under way be as slow as can be."""

    def choice(self, seq):  # type: ignore[no-untyped-def]
        return seq[min(1, len(seq) - 1)]


def test_a_freed_cluster_waits_for_the_transfers_under_way() -> None:
    """A read begun before the discard, and slow, must not see who gets the cluster next (law 5)."""
    bench = set_up(64 * 512)
    bench.write(0, b"\1" * 512)
    bench.driver.random = OldestLast()
    target = bytearray(512)

    async def discard_and_reuse() -> None:
        await bench.image.discard(0, 512)
        for cluster in range(1, 64):
            await bench.image.write(cluster * 512, MemoryBuffer(memoryview(b"\2" * 512)))

    bench.driver.spawn(bench.image.read(0, MemoryBuffer(memoryview(target))))
    bench.driver.spawn(discard_and_reuse())
    bench.driver.finish()
    assert target in (b"\1" * 512, bytes(512))


def test_a_freed_cluster_is_used_again() -> None:
    bench = set_up(64 * 512)
    for _ in range(100):
        bench.write(0, b"\1" * 512)
        bench.driver.run(bench.image.discard(0, 512))
    assert bench.image.statistics.clusters_freed == 100
    assert bench.file.size < 64 * 512


def test_bytes_past_the_last_used_cluster_are_never_seen() -> None:
    """A file may be longer than what its refcounts cover, after a crash for one; what is there is nobody's data."""
    bench = set_up(64 * 512)
    bench.file.write(bench.file.size, noise(100 * 512))
    bench = open_again(bench, writable=True)
    for cluster in range(64):
        bench.write(cluster * 512 + 100, b"x")
    assert bench.content() == (bytes(100) + b"x" + bytes(411)) * 64


def test_flush_is_one_sync() -> None:
    bench = set_up(64 * 512)
    bench.write(0, b"x" * 512)
    operations = bench.driver.operations
    bench.driver.run(bench.image.flush())
    assert bench.driver.operations == operations + 1


def test_plain_data_in_a_reserved_cluster_is_linked_without_a_sync() -> None:
    bench = set_up(1 << 20, cluster_bits=12)
    bench.write(0, b"x" * 512)
    syncs: list[op.Operation] = []
    bench.breaker.fault = lambda operation: syncs.append(operation) if isinstance(operation, op.Sync) else None
    bench.write(4096, b"y" * 512)
    assert syncs == []
