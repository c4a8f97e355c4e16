"""Replay: what a killed process logged is brought into its image, whatever the image contradicts is not."""

import random

import pytest

from qcow2.driver.crash import CrashDriver, SimulatedFile, SimulatedMemory, points
from qcow2.layout import COPIED, L2_COMPRESSED, L2_ZERO
from qcow2.linklog import Link, LinkLog
from qcow2.replay import Outcome, replay
from tests.engine import IDENTITY, TAG, Bench, noise, set_up

CLUSTER = 512
BASE = noise(150 * CLUSTER, 7)
WRITTEN = (3, 4, 70, 140)


def killed(*, lazy: bool = False) -> Bench:
    """An overlay whose process died with links that wait."""
    bench = set_up(len(BASE), base=BASE, log_capacity=64, lazy=lazy)
    for cluster in WRITTEN:
        bench.write(cluster * CLUSTER, noise(CLUSTER, cluster))
    return bench


def run_replay(file: SimulatedFile, content: bytes, identity: bytes = IDENTITY) -> Outcome:
    outcome: Outcome = CrashDriver().run(replay(file, content, identity))
    return outcome


def logged(bench: Bench) -> bytes:
    return bytes(bench.file.memory.content)


def log_of(*links: Link) -> bytes:
    """The bytes of a log that says so."""
    memory = SimulatedMemory()

    async def write() -> None:
        log = LinkLog(memory, IDENTITY, TAG, 64)
        await log.begin()
        await log.append(links)

    CrashDriver().run(write())
    return bytes(memory.content)


def test_links_that_waited_are_in_the_file() -> None:
    bench = killed()
    expected = bench.content()
    assert bench.reopened_content() != expected
    assert run_replay(bench.file, logged(bench)) == Outcome(is_void=False, replayed=len(WRITTEN))
    assert bench.reopened_content() == expected


def test_a_second_replay_changes_nothing() -> None:
    bench = killed()
    run_replay(bench.file, logged(bench))
    before = bench.file.content()
    assert run_replay(bench.file, logged(bench)) == Outcome(is_void=False)
    assert bench.file.content() == before


@pytest.mark.parametrize("lazy", [False, True], ids=["accurate", "lazy"])
def test_a_replay_that_is_killed_anywhere_is_done_by_the_next(lazy: bool) -> None:
    bench = killed(lazy=lazy)
    expected = bench.content()
    before = bench.file.copy()
    driver = CrashDriver()
    driver.run(replay(bench.file, logged(bench), IDENTITY))
    log, deaths = logged(bench), 0
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
    driver.run(replay(bench.file, logged(bench), IDENTITY))
    for point in points(driver.journal, before, bench.file):
        parts = [part for _, effect in point.pending for part in effect.tear()]
        for _ in range(5):
            left = point.keep(part for part in parts if draw.random() < 0.5)
            seen = Bench(driver, bench.breaker, left, bench.base, bench.image).reopened_content()
            for start in range(0, len(old), CLUSTER):
                assert seen[start : start + CLUSTER] in (old[start : start + CLUSTER], new[start : start + CLUSTER])


def test_a_tag_that_is_gone_voids_the_log() -> None:
    """As another program's writable open leaves it."""
    bench = killed()
    bench.file.write(88, bytes(8))
    before = bench.file.content()
    assert run_replay(bench.file, logged(bench)) == Outcome(is_void=True)
    assert bench.file.content() == before


def test_a_tag_of_another_log_voids_this_one() -> None:
    bench = killed()
    bench.file.write(88, ((TAG + 1) << 32).to_bytes(8, "big"))
    assert run_replay(bench.file, logged(bench)).is_void


def test_a_log_of_another_boot_is_void() -> None:
    bench = killed()
    assert run_replay(bench.file, logged(bench), b"after".ljust(32)).is_void


def test_an_empty_log_is_not_missed() -> None:
    bench = killed()
    bench.file.write(88, bytes(8))
    assert run_replay(bench.file, log_of()) == Outcome(is_void=False)


def test_a_cluster_that_has_changed_since_keeps_what_it_has() -> None:
    bench = killed()
    expected = bytearray(bench.content())
    offset = bench.image._mapping.table_offset(0) + 8 * WRITTEN[1]
    bench.file.write(offset, (L2_ZERO).to_bytes(8, "big"))
    expected[WRITTEN[1] * CLUSTER : (WRITTEN[1] + 1) * CLUSTER] = bytes(CLUSTER)
    assert run_replay(bench.file, logged(bench)) == Outcome(is_void=False, replayed=len(WRITTEN) - 1, dropped=1)
    assert bench.reopened_content() == expected


NEW = 20 * CLUSTER | COPIED  # inside the file, and a cluster of data


@pytest.mark.parametrize(
    "link",
    [
        Link(150, 0, NEW),  # past the end of the disk
        Link((1 << 64) - 2, 0, NEW),
        Link(1 << 60, 0, NEW),
        Link(5, 0, NEW ^ COPIED),
        Link(5, 0, NEW | L2_ZERO),
        Link(5, 0, NEW | L2_COMPRESSED),
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
    before = bench.file.content()
    assert run_replay(bench.file, log_of(link)) == Outcome(is_void=False, dropped=1)
    assert bench.file.content() == before


def test_a_link_to_a_table_is_dropped() -> None:
    bench = killed()
    before = bench.file.content()
    table = bench.image._mapping.table_offset(0)
    assert run_replay(bench.file, log_of(Link(5, 0, table | COPIED))).dropped == 1
    assert bench.file.content() == before


def test_two_links_to_one_cluster_are_one() -> None:
    bench = killed()
    assert run_replay(bench.file, log_of(Link(5, 0, NEW), Link(6, 0, NEW))) == Outcome(False, replayed=1, dropped=1)


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
        run_replay(bench.file, log_of(*links))
        assert bench.file.size == size
        bench.reopened_content()
