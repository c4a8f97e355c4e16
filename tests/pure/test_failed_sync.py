"""A failed sync is no secret of the process that saw it: the next one writes all tables again (law 7)."""

import errno

import pytest

from qcow2.driver import operation as op
from qcow2.format.header import read_header
from qcow2.format.layout import HEADER_INCOMPATIBLE_OFFSET
from qcow2.judge.census import take_census
from qcow2.judge.repair import repair
from qcow2.judge.report import Report
from qcow2.plane.tally import Role
from tests.crash.driver import CrashDriver, Issued, SimulatedFile, points
from tests.engine import Bench, noise, set_up

CLUSTER = 512
SIZE = 300 * CLUSTER
FIRST, SECOND = range(20), range(100, 240, 7)  # guest clusters


def failed(*, version: int = 3, lazy: bool = False, has_subclusters: bool = False) -> Bench:
    """An image whose first writes were flushed, and whose second ones were not."""
    bits = 14 if has_subclusters else 9
    size = SIZE << bits - 9
    bench = set_up(size, cluster_bits=bits, version=version, lazy=lazy, has_subclusters=has_subclusters)
    for cluster in FIRST:
        bench.write(cluster << bits, noise(1 << bits, cluster))
    bench.driver.run(bench.image.flush())
    for cluster in SECOND:
        bench.write(cluster << bits, noise(1 << bits, cluster))
    bench.breaker.fault = sync_fails
    with pytest.raises(OSError, match="as told"):
        bench.driver.run(bench.image.flush())
    bench.breaker.fault = None
    return bench


def sync_fails(operation: op.Operation) -> OSError | None:
    return OSError(errno.EIO, "as told") if isinstance(operation, op.Sync) else None


def on_disk(bench: Bench) -> SimulatedFile:
    """What came before the last sync that did not fail."""
    for point in points(bench.driver.journal, SimulatedFile("disk", {}, 0), bench.file):
        left = point.keep([])
    return left


def is_dirty(file: SimulatedFile) -> bool:
    return bool(file.content()[HEADER_INCOMPATIBLE_OFFSET + 7] & 1)


def tables(file: SimulatedFile) -> dict[int, bytes]:
    """The clusters of the header and of all tables: their contents by number."""
    driver = CrashDriver()
    census = driver.run(take_census(file, driver.run(read_header(file)), Report()))
    size = census.cluster_size
    return {cluster: file.read(cluster * size, size) for cluster in census.tally.clusters(Role.SINGLE | Role.L2)}


KINDS = [{}, {"lazy": True}, {"has_subclusters": True}]


@pytest.mark.parametrize("kind", KINDS, ids=["accurate", "lazy", "subclusters"])
def test_the_next_open_writes_what_the_host_takes_for_written(kind: dict[str, bool]) -> None:
    bench = failed(**kind)
    disk, driver = on_disk(bench), CrashDriver()
    assert is_dirty(bench.file)
    assert tables(disk) != tables(bench.file)
    report = driver.run(repair(bench.file))
    assert not report.unsound
    for entry in driver.journal:
        if isinstance(entry, Issued):
            entry.effect.apply(disk)
    assert not is_dirty(disk)
    assert tables(disk) == tables(bench.file)


def test_version_2_has_no_bit_that_tells() -> None:
    bench = failed(version=2)
    assert bench.file.content()[:CLUSTER] == on_disk(bench).content()[:CLUSTER]


def test_a_repair_whose_sync_failed_is_done_again() -> None:
    bench = set_up(SIZE)
    for cluster in FIRST:
        bench.write(cluster * CLUSTER, noise(CLUSTER, cluster))
    bench.close()
    right, block = bench.file.content(), refcount_block(bench.file)
    bench.file.write(block, bytes(CLUSTER))
    disk = bench.file.copy()
    with pytest.raises(OSError, match="as told"):
        CrashDriver(fault=sync_fails).run(repair(bench.file))
    driver = CrashDriver()
    assert not driver.run(repair(bench.file)).unsound
    for entry in driver.journal:
        if isinstance(entry, Issued):
            entry.effect.apply(disk)
    assert disk.content() == right


def refcount_block(file: SimulatedFile) -> int:
    record = CrashDriver().run(read_header(file)).record
    return int.from_bytes(file.read(record.refcount_table_offset, 8), "big")
