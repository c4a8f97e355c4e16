"""Replay: what a killed process logged is brought into its image, whatever the image contradicts is not."""

import errno
import random

import pytest

from qcow2.driver import operation as op
from qcow2.engine.replay import Outcome, replay
from qcow2.format.header import read_header
from qcow2.judge.check import check
from qcow2.plane.entry import l1_table, words_of
from qcow2.plane.linklog import Link
from tests.builder.record import COMPRESSED, COPIED, ZERO
from tests.crash.driver import CrashDriver, Issued, SimulatedFile, points
from tests.engine import Bench, noise, set_up, waiting

CLUSTER = 512
BASE = noise(150 * CLUSTER, 7)
WRITTEN = (3, 4, 70, 140)


def killed(*, lazy: bool = False) -> Bench:
    """An overlay whose process died with links that wait."""
    bench = set_up(len(BASE), base=BASE, log_capacity=64, lazy=lazy)
    for cluster in WRITTEN:
        bench.write(cluster * CLUSTER, noise(CLUSTER, cluster))
    return bench


async def recover(file: SimulatedFile, links: list[Link]) -> Outcome:
    return await replay(file, await read_header(file, trust_refcounts=False), links)


def run_replay(file: SimulatedFile, links: list[Link]) -> Outcome:
    outcome: Outcome = CrashDriver().run(recover(file, links))
    return outcome


def logged(bench: Bench) -> list[Link]:
    """What waited when the process died."""
    links = waiting(bench.file)
    assert links
    return links


def test_links_that_waited_are_in_the_file() -> None:
    bench = killed()
    expected = bench.content()
    assert bench.reopened_content() != expected
    assert run_replay(bench.file, logged(bench)) == Outcome(replayed=len(WRITTEN))
    assert bench.reopened_content() == expected


def test_a_second_replay_changes_nothing() -> None:
    bench = killed()
    links = logged(bench)
    run_replay(bench.file, links)
    assert waiting(bench.file) == []
    before = bench.file.content()
    assert run_replay(bench.file, links) == Outcome()
    assert bench.file.content() == before


@pytest.mark.parametrize("lazy", [False, True], ids=["accurate", "lazy"])
def test_a_replay_that_is_killed_anywhere_is_done_by_the_next(lazy: bool) -> None:
    bench = killed(lazy=lazy)
    expected = bench.content()
    before = bench.file.copy()
    driver = CrashDriver()
    log, deaths = logged(bench), 0
    driver.run(recover(bench.file, log))
    for point in points(driver.journal, before, bench.file):
        left = point.keep(effect for _, effect in point.pending)
        assert not run_replay(left, log).dropped
        assert Bench(driver, bench.breaker, left, bench.base, bench.image).reopened_content() == expected
        deaths += 1
    assert deaths > 2 * len(WRITTEN)


def test_a_power_loss_during_a_replay_leaves_each_cluster_old_or_new() -> None:
    """Without the log, which the power loss took along."""
    bench = killed()
    new, old = bench.content(), BASE
    before, driver, draw = bench.file.copy(), CrashDriver(), random.Random(3)
    driver.run(recover(bench.file, logged(bench)))
    for point in points(driver.journal, before, bench.file):
        parts = [part for _, effect in point.pending for part in effect.tear()]
        for _ in range(5):
            left = point.keep(part for part in parts if draw.random() < 0.5)
            seen = Bench(driver, bench.breaker, left, bench.base, bench.image).reopened_content()
            for start in range(0, len(old), CLUSTER):
                assert seen[start : start + CLUSTER] in (old[start : start + CLUSTER], new[start : start + CLUSTER])


@pytest.mark.parametrize("lazy", [False, True], ids=["accurate", "lazy"])
def test_what_a_sync_that_failed_has_lost_is_written_again(lazy: bool) -> None:
    """The host thinks that all is on the disk, where nothing came since the last sync that did not fail."""
    bench = killed(lazy=lazy)
    expected, on_disk = bench.content(), SimulatedFile("disk", {}, 0)
    for point in points(bench.driver.journal, SimulatedFile("disk", {}, 0), bench.file):
        on_disk = point.keep([])
    driver = CrashDriver()
    driver.run(recover(bench.file, logged(bench)))
    for entry in driver.journal:
        if isinstance(entry, Issued):
            entry.effect.apply(on_disk)
    left = Bench(driver, bench.breaker, on_disk, bench.base, bench.image)
    assert left.reopened_content() == expected
    assert lazy or CrashDriver().run(check(on_disk)).corruptions == 0


def test_a_replay_whose_sync_failed_is_done_again() -> None:
    """It finds its entries in place, where the host thinks that they are on the disk."""
    bench = killed()
    expected, on_disk, links = bench.content(), bench.file.copy(), logged(bench)
    syncs = []

    def fault(operation: op.Operation) -> OSError | None:
        syncs.extend([operation] if isinstance(operation, op.Sync) else [])
        return OSError(errno.EIO, "as told") if operation in syncs[1:] else None  # after the entries

    with pytest.raises(OSError, match="as told"):
        CrashDriver(fault=fault).run(recover(bench.file, links))
    driver = CrashDriver()
    driver.run(recover(bench.file, links))
    for entry in driver.journal:
        if isinstance(entry, Issued):
            entry.effect.apply(on_disk)
    assert Bench(driver, bench.breaker, on_disk, bench.base, bench.image).reopened_content() == expected


def test_a_cluster_that_has_changed_since_keeps_what_it_has() -> None:
    bench = killed()
    expected = bytearray(bench.content())
    offset = bench.image._mapping.table_offset(0) + 8 * WRITTEN[1]
    bench.file.write(offset, (ZERO).to_bytes(8, "big"))
    expected[WRITTEN[1] * CLUSTER : (WRITTEN[1] + 1) * CLUSTER] = bytes(CLUSTER)
    assert run_replay(bench.file, logged(bench)) == Outcome(replayed=len(WRITTEN) - 1, dropped=1)
    assert bench.reopened_content() == expected


NEW = 20 * CLUSTER | COPIED  # inside the file, and a cluster of data


@pytest.mark.parametrize(
    "link",
    [
        Link(150, 0, NEW),  # past the end of the disk
        Link((1 << 64) - 2, 0, NEW),
        Link(1 << 60, 0, NEW),
        Link(5, 0, NEW ^ COPIED),
        Link(5, 0, NEW | ZERO),
        Link(5, 0, NEW | COMPRESSED),
        Link(5, 0, NEW | 1 << 60),  # a reserved bit
        Link(5, 0, 0 | COPIED),  # the header
        Link(5, 0, CLUSTER | COPIED),  # the refcount table
        Link(5, 0, 1 << 40 | COPIED),  # past the end of the file
        Link(5, 0, (1 << 64) - 1),
        Link(5, 7 << 20, NEW),  # it was never so
    ],
)
def test_a_link_that_cannot_be_is_dropped(link: Link) -> None:
    bench = killed()
    bench.file.write(88, bytes(8))  # what a replay clears
    before = bench.file.content()
    assert run_replay(bench.file, [link]) == Outcome(dropped=1)
    assert bench.file.content() == before


def test_a_link_to_a_table_is_dropped() -> None:
    bench = killed()
    bench.file.write(88, bytes(8))  # what a replay clears
    before = bench.file.content()
    table = bench.image._mapping.table_offset(0)
    assert run_replay(bench.file, [Link(5, 0, table | COPIED)]).dropped == 1
    assert bench.file.content() == before


def test_a_link_to_a_table_of_a_snapshot_is_dropped() -> None:
    bench = killed()
    bench.driver.run(bench.image.settle())
    bench.driver.run(bench.image.create_snapshot("kept", 0))
    bench.write(3 * CLUSTER, noise(CLUSTER, 1))
    record = bench.driver.run(bench.image.snapshots())[0].record
    table = l1_table(words_of(bench.file.content()[record.l1_table_offset :][:8])[0])
    for host_offset in (bench.image.header.record.snapshots_offset, record.l1_table_offset, table):
        assert run_replay(bench.file, [Link(5, 0, host_offset | COPIED)]).dropped == 1


def test_two_links_to_one_cluster_are_one() -> None:
    bench = killed()
    assert run_replay(bench.file, [Link(5, 0, NEW), Link(6, 0, NEW)]) == Outcome(replayed=1, dropped=1)


def test_random_links_never_break_the_image() -> None:
    draw = random.Random(11)
    for _ in range(30):
        bench = killed()
        size = bench.file.size
        links = [
            Link(
                draw.choice([draw.randrange(160), draw.getrandbits(64)]), draw.choice([0, draw.getrandbits(64)]), entry
            )
            for entry in (draw.choice([draw.getrandbits(64), draw.randrange(100) << 9 | COPIED]) for _ in range(20))
        ]
        run_replay(bench.file, links)
        assert bench.file.size == size
        bench.reopened_content()
