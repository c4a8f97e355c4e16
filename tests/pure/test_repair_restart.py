"""Law 8: a repair that dies at any point leaves an image whose next repair ends in the same place."""

import random
import struct
from collections.abc import Callable

import pytest

from qcow2.engine.create import Options, create
from qcow2.engine.image import Image
from qcow2.engine.opened import OpenOptions
from qcow2.engine.plain import Preallocation
from qcow2.format.header import read_header
from qcow2.format.snapshot import read_snapshots
from qcow2.judge.check import check
from qcow2.judge.repair import RepairMode, repair
from tests.crash.driver import CrashDriver, Entry, SimulatedFile, Synced, points
from tests.engine import set_up

CLUSTER = 512
CLUSTERS = 600
DIRTY = struct.pack(">Q", 1)


def sound(refcount_order: int = 4) -> SimulatedFile:
    """A disk of CLUSTERS clusters, all of them there, so that at least two refcount blocks count."""
    file = SimulatedFile("a.qcow2", {}, 0)
    options = Options(
        CLUSTERS * CLUSTER, cluster_bits=9, refcount_order=refcount_order, preallocation=Preallocation.METADATA
    )
    CrashDriver().run(create(file, options))
    for index in range(CLUSTERS):
        file.write(file.size - (CLUSTERS - index) * CLUSTER, bytes([index % 255 + 1]) * CLUSTER)
    return file


def refcount_table(file: SimulatedFile) -> int:
    return struct.unpack(">Q", file.read(48, 8))[0]


def refcount_block(file: SimulatedFile, index: int) -> int:
    return struct.unpack(">Q", file.read(refcount_table(file) + 8 * index, 8))[0]


def forget_counts(file: SimulatedFile) -> None:
    """As a lazy image after a crash: in place, everything is too low."""
    file.write(72, DIRTY)
    for index in range(2):
        file.write(refcount_block(file, index) + 40, bytes(CLUSTER - 40))


def lose_a_block(file: SimulatedFile) -> None:
    """The structure itself is incomplete: it must be built anew."""
    file.write(72, DIRTY)
    file.write(refcount_table(file) + 8, bytes(8))


def confuse_copied(file: SimulatedFile) -> None:
    file.write(72, DIRTY)
    l1 = struct.unpack(">Q", file.read(40, 8))[0]
    table = struct.unpack(">Q", file.read(l1, 8))[0] & 0x00FF_FFFF_FFFF_FE00
    for index in range(0, 64, 3):
        entry = struct.unpack(">Q", file.read(table + 8 * index, 8))[0]
        file.write(table + 8 * index, struct.pack(">Q", entry ^ 1 << 63))


DAMAGES = [forget_counts, lose_a_block, confuse_copied]


def mapped(file: SimulatedFile) -> bytes:
    """The guest's data clusters, which repair must not touch."""
    return file.read(sound().size - CLUSTERS * CLUSTER, CLUSTERS * CLUSTER)


def require_repaired(file: SimulatedFile, expected: bytes, table: int) -> None:
    report = CrashDriver().run(check(file))
    assert (report.check_errors, report.corruptions, report.leaks) == (0, 0, 0)
    assert not CrashDriver().run(read_header(file)).is_dirty
    assert mapped(file) == expected
    assert refcount_table(file) == table


@pytest.mark.parametrize("refcount_order", [3, 4, 6])
@pytest.mark.parametrize("damage", DAMAGES)
def test_repair_restarts_from_any_death(damage: Callable[[SimulatedFile], None], refcount_order: int) -> None:
    damaged = sound(refcount_order)
    damage(damaged)
    file, driver = damaged.copy(), CrashDriver()
    driver.run(repair(file))
    expected, table = mapped(file), refcount_table(file)
    require_repaired(file, expected, table)
    rng = random.Random(damage.__name__)
    for state in deaths(driver.journal, damaged, file, rng):
        if CrashDriver().run(read_header(state, trust_refcounts=False)).is_dirty:
            CrashDriver().run(repair(state))
        require_repaired(state, expected, table)


def deaths(journal: list[Entry], before: SimulatedFile, file: SimulatedFile, rng: random.Random) -> list[SimulatedFile]:
    """What may be on the disk: after a kill all that was written, after a power loss any part, torn at sectors."""
    found = []
    for point in points(journal, before, file):
        found.append(point.after_kill())
        torn = [part for _, effect in point.pending for part in effect.tear()]
        found += [point.keep(part for part in torn if rng.random() < share) for share in (0.2, 0.5, 0.8)]
    return found


def test_completing_snapshots_restarts_from_any_death() -> None:
    """At no time a table is found that nobody has written, nor is one counted too low without the dirty bit."""
    damaged = sound()
    image = CrashDriver().run(Image.open(damaged, options=OpenOptions(writable=True)))
    CrashDriver().run(image.create_snapshot("kept", 0))
    CrashDriver().run(image.close())
    (offset,) = struct.unpack(">Q", damaged.read(64, 8))
    entry = damaged.read(offset, 40 + 24 + 5)
    damaged.write(offset, entry[:36] + bytes(4) + entry[64:] + bytes(24))
    file, driver = damaged.copy(), CrashDriver()
    driver.run(repair(file))
    for state in [file, *deaths(driver.journal, damaged, file, random.Random(0))]:
        header = CrashDriver().run(read_header(state, trust_refcounts=False))
        if header.record.snapshots_offset != offset and not header.is_dirty:
            assert CrashDriver().run(check(state)).corruptions == 0
        CrashDriver().run(repair(state))
        report = CrashDriver().run(check(state))
        assert (report.check_errors, report.corruptions, report.leaks) == (0, 0, 0)
        header = CrashDriver().run(read_header(state))
        assert not header.is_dirty
        (snapshot,) = CrashDriver().run(read_snapshots(state, header)).snapshots
        assert (snapshot.name, len(snapshot.extra), snapshot.disk_size) == ("kept", 16, CLUSTERS * CLUSTER)


@pytest.mark.parametrize("mode", RepairMode)
def test_power_fails_in_a_repair_of_what_a_killed_process_has_changed(mode: RepairMode) -> None:
    """Law 5: no count falls while the entry that led to the cluster may come back."""
    bench = set_up(64 * CLUSTER)
    bench.write(0, b"a" * 40 * CLUSTER)
    bench.driver.run(bench.image.flush())
    before = bench.file.copy()
    bench.driver.journal.clear()
    bench.driver.run(bench.image.discard(0, 8 * CLUSTER))
    nlowered = 0
    for killed in points(list(bench.driver.journal), before, bench.file):
        found = killed.after_kill()
        driver, repaired = CrashDriver(), found.copy()
        nlowered += driver.run(repair(repaired, mode)).leaks_fixed
        for died in points(driver.journal, found, repaired):
            if any(isinstance(entry, Synced) for entry in driver.journal[: died.position]):
                break  # which made stable what the killed process had changed as well
            lost = killed.stable.copy()
            for _, effect in died.pending:
                effect.apply(lost)
            assert CrashDriver().run(check(lost)).corruptions == 0
    assert nlowered
