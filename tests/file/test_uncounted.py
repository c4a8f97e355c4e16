"""Images that do not count all they use: what their refcounts call free is not overwritten."""

import errno
import random
import struct
import subprocess
from pathlib import Path

import pytest

import qcow2
from qcow2.driver import operation as op
from qcow2.format.layout import HEADER_INCOMPATIBLE_OFFSET, Incompatible
from tests.builder import Built, Recipe, build
from tests.builder.record import COPIED, OFFSET_MASK
from tests.engine import Bench, open_again, set_up
from tests.frontend import FrontEnd
from tests.oracle import qemu_img
from tests.program import Daemon, qcow2_tool

CLUSTER = 65536
OLD, NEW = b"\7" * CLUSTER, b"\x09" * CLUSTER


def snapshotted(tmp_path: Path, version: int = 3) -> Built:
    recipe = Recipe(size=256 * CLUSTER, version=version)
    for cluster in range(8):
        recipe.data(cluster, OLD)
    recipe.snapshot("precious")
    return build(recipe, tmp_path / "disk")


def number(built: Built, host_offset: int) -> int:
    return int(struct.unpack(">Q", built.peek(host_offset, 8))[0])


def incompatible(built: Built) -> int:
    return number(built, HEADER_INCOMPATIBLE_OFFSET)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("what", ["snapshot table", "snapshot's L1 table", "snapshot's L2 table"])
def test_uncounted_table_of_a_snapshot_ends_all_writes(tmp_path: Path, what: str, version: int) -> None:
    built = snapshotted(tmp_path, version)
    table = number(built, 64)
    where = table
    if what != "snapshot table":
        where = number(built, table)
    if what == "snapshot's L2 table":  # its own, once the disk has another
        with qcow2.open(built.path, writable=True) as disk:
            disk.write(0, NEW)
        where = number(built, where) & OFFSET_MASK
    built.set_refcount(where, 0)
    before = built.peek(where, CLUSTER)
    disk = qcow2.open(built.path, writable=True)
    with pytest.raises((qcow2.CorruptImage, OSError)):
        disk.write(100 * CLUSTER, NEW)
    assert disk.read(CLUSTER, CLUSTER) == OLD
    with pytest.raises(OSError, match="no more writes"):
        disk.close()
    assert built.peek(where, CLUSTER) == before
    if version == 3:
        assert incompatible(built) & Incompatible.CORRUPT
        with pytest.raises(qcow2.CorruptImage, match="marked corrupt"):
            qcow2.open(built.path, writable=True)


def test_uncounted_table_ends_all_writes_though_a_bitmap_meets_it_first(tmp_path: Path) -> None:
    built = snapshotted(tmp_path)
    qemu_img("bitmap", "--add", built.path, "records")  # whose bits have no cluster yet
    built.set_refcount(number(built, 64), 0)
    disk = qcow2.open(built.path, writable=True)
    with pytest.raises(qcow2.CorruptImage, match="has refcount 0"):
        disk.write(0, NEW)
    with pytest.raises(OSError, match="no more writes"):
        disk.write(0, NEW)
    with pytest.raises(OSError, match="no more writes"):
        disk.close()
    assert incompatible(built) & Incompatible.CORRUPT


def test_guest_data_inside_a_snapshots_table_is_refused(tmp_path: Path) -> None:
    built = snapshotted(tmp_path)
    l1 = number(built, number(built, 64))
    before = built.peek(l1, CLUSTER)
    built.set_l2(20, l1 | 1 << 63)
    built.set_l1(0, built.l2_offsets[0] | 1 << 63)
    disk = qcow2.open(built.path, writable=True)
    with pytest.raises(qcow2.CorruptImage, match="holds metadata"):
        disk.write(20 * CLUSTER, NEW)
    with pytest.raises(OSError, match="no more writes"):
        disk.write(0, NEW)
    assert disk.read(0, CLUSTER) == OLD
    with pytest.raises(OSError, match="no more writes"):
        disk.close()
    assert built.peek(l1, CLUSTER) == before
    assert incompatible(built) & Incompatible.CORRUPT


@pytest.mark.parametrize("version", [2, 3])
def test_uncounted_guest_data_is_not_handed_out(tmp_path: Path, version: int) -> None:
    recipe = Recipe(size=256 * CLUSTER, version=version)
    for cluster in range(32):
        recipe.data(cluster, OLD)
    recipe.compressed(40, b"packed")
    built = build(recipe, tmp_path / "disk")
    for cluster in range(32):
        built.set_refcount(built.l2(cluster) & OFFSET_MASK, 0)
    built.set_refcount(built.l2(40) & (1 << 54) - 1 & -CLUSTER, 0)
    with qcow2.open(built.path, writable=True) as disk:
        for cluster in range(100, 164):
            disk.write(cluster * CLUSTER, b"x")  # a byte: nothing around it may be zeroed either
    with qcow2.open(built.path) as disk:
        assert disk.read(0, 32 * CLUSTER) == OLD * 32
        assert disk.read(40 * CLUSTER, 6) == b"packed"
        assert all(disk.read(cluster * CLUSTER, 2) == b"x\0" for cluster in range(100, 164))
    assert version == 2 or not incompatible(built)


@pytest.mark.parametrize("is_lazy", [False, True])
def test_uncounted_guest_data_can_be_let_go(tmp_path: Path, is_lazy: bool) -> None:
    recipe = Recipe(size=256 * CLUSTER)
    for cluster in range(32):
        recipe.data(cluster, OLD)
    built = build(recipe, tmp_path / "disk")
    for cluster in range(16):
        entry = built.l2(cluster)
        built.set_refcount(entry & OFFSET_MASK, 0)
        if cluster % 2:
            built.set_l2(cluster, entry & OFFSET_MASK)  # not its own, as far as is known: a write copies
    with qcow2.open(built.path, writable=True, lazy_refcounts=is_lazy) as disk:
        disk.write(0, NEW * 4)
        disk.discard(4 * CLUSTER, 4 * CLUSTER)
        disk.write(100 * CLUSTER, NEW * 64)
        disk.flush()
        assert disk.read(0, 12 * CLUSTER) == NEW * 4 + bytes(4 * CLUSTER) + OLD * 4
    with qcow2.open(built.path) as disk:
        assert disk.read(0, 32 * CLUSTER) == NEW * 4 + bytes(4 * CLUSTER) + OLD * 24
        assert disk.read(100 * CLUSTER, 64 * CLUSTER) == NEW * 64


def test_uncounted_guest_data_is_kept_by_no_snapshot(tmp_path: Path) -> None:
    """Its count of one would be that of the disk alone: another program would free what the snapshot has."""
    recipe = Recipe(size=256 * CLUSTER)
    recipe.data(0, OLD)
    recipe.data(1, OLD)
    built = build(recipe, tmp_path / "disk")
    where = built.l2(1) & OFFSET_MASK
    built.set_refcount(where, 0)
    with qcow2.open(built.path, writable=True) as disk:
        with pytest.raises(qcow2.CorruptImage, match=f"cluster {where // CLUSTER} is in use, but its refcount is 0"):
            disk.create_snapshot("precious")
        disk.write(CLUSTER, NEW)
        assert not list(disk.snapshots)
    assert qcow2_tool("check", "-q", "-r", "all", built.path).returncode == 0
    with qcow2.open(built.path, writable=True) as disk:
        disk.create_snapshot("precious")
        disk.write(CLUSTER, OLD)
        disk.apply_snapshot("precious")
        assert disk.read(0, 2 * CLUSTER) == OLD + NEW


def test_nobody_goes_back_to_a_snapshot_of_what_is_uncounted(tmp_path: Path) -> None:
    built = snapshotted(tmp_path)
    where = built.l2(1) & OFFSET_MASK
    built.set_refcount(where, 0)
    with qcow2.open(built.path, writable=True) as disk:
        disk.write(0, NEW)
        with pytest.raises(qcow2.CorruptImage, match=f"cluster {where // CLUSTER} is in use, but its refcount is 0"):
            disk.apply_snapshot("precious")
        assert disk.read(0, 2 * CLUSTER) == NEW + OLD


def test_data_that_only_a_snapshot_has_is_not_handed_out(tmp_path: Path) -> None:
    recipe = Recipe(size=256 * CLUSTER)
    recipe.data(0, OLD)
    recipe.snapshot("precious")
    recipe.data(0, NEW)
    built = build(recipe, tmp_path / "disk")
    l2 = number(built, number(built, number(built, 64))) & OFFSET_MASK
    where = number(built, l2) & OFFSET_MASK
    built.set_refcount(where, 0)
    with qcow2.open(built.path, writable=True) as disk:
        disk.write(100 * CLUSTER, NEW * 8)
    assert built.peek(where, CLUSTER) == OLD


def test_holes_that_nothing_refers_to_are_used(tmp_path: Path) -> None:
    recipe = Recipe(size=256 * CLUSTER)
    for cluster in range(32):
        recipe.data(cluster, OLD)
    built = build(recipe, tmp_path / "disk")
    with qcow2.open(built.path, writable=True) as disk:
        disk.discard(0, 16 * CLUSTER)
    nbytes = built.path.stat().st_size
    with qcow2.open(built.path, writable=True) as disk:
        disk.write(100 * CLUSTER, NEW * 8)
    assert built.path.stat().st_size == nbytes


def uncounted_bench(nclusters: int) -> Bench:
    """Data in the first clusters, every second of them uncounted."""
    bench = set_up(100 * 512)
    for cluster in range(nclusters):
        bench.write(cluster * 512, b"\7" * 512)
    bench.close()
    (l1,) = struct.unpack(">Q", bench.file.read(40, 8))
    (table,) = struct.unpack(">Q", bench.file.read(48, 8))
    (block,) = struct.unpack(">Q", bench.file.read(table, 8))
    (l2,) = struct.unpack(">Q", bench.file.read(l1, 8))
    for entry in struct.unpack(f">{nclusters}Q", bench.file.read(l2 & OFFSET_MASK, nclusters * 8))[::2]:
        bench.file.write(block + 2 * ((entry & OFFSET_MASK) // 512), b"\0\0")
    return open_again(bench, writable=True)


def test_file_that_cannot_grow_is_full_before_uncounted_data_is_touched() -> None:
    bench = uncounted_bench(40)
    full = OSError(errno.ENOSPC, "full")
    bench.breaker.fault = lambda operation: full if isinstance(operation, op.Resize) else None
    with pytest.raises(OSError, match="full"):
        bench.write(40 * 512, b"\x09" * 60 * 512)
    assert bench.read(0, 40 * 512) == b"\7" * 40 * 512


def test_tables_that_cannot_be_read_let_the_file_grow() -> None:
    bench = uncounted_bench(40)
    end = bench.file.size
    bench.write(40 * 512, b"\x09" * 512)
    bench = uncounted_bench(40)
    reads: list[op.Operation] = []

    def fault(operation: op.Operation) -> OSError | None:
        if isinstance(operation, op.Read) and not reads and operation.host_offset != 0:
            reads.append(operation)
            return OSError(errno.EIO, "unreadable")
        return None

    bench.driver.run(bench.image.resolve(0, 512))  # what the write itself needs is in memory
    bench.breaker.fault = fault
    bench.driver.run(bench.image.flush())
    assert bench.file.size == end


def fill(recipe: Recipe, draw: random.Random, share: float, view: list[bytes]) -> None:
    for cluster in range(len(view)):
        if draw.random() < share:
            view[cluster] = bytes([draw.randrange(1, 256)]) * 512
            recipe.data(cluster, view[cluster])


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("seed", range(12))
def test_no_change_of_a_disk_hits_what_counts_too_low(tmp_path: Path, seed: int, count: int) -> None:
    """Some data clusters count *count*, though a snapshot shares many of them."""
    draw, view = random.Random(seed), [bytes(512)] * 200
    recipe = Recipe(size=200 * 512, cluster_bits=9, version=draw.choice([2, 3]))
    fill(recipe, draw, 0.4, view)
    recipe.snapshot("precious")
    precious = b"".join(view)
    fill(recipe, draw, 0.3, view)
    built = build(recipe, tmp_path / "disk")
    for cluster in range(200):
        where = built.l2(cluster) & OFFSET_MASK if cluster // 64 in built.l2_offsets else 0
        if where and draw.random() < 0.5:
            built.set_refcount(where, count)
    lazy = recipe.version == 3 and draw.random() < 0.5
    with qcow2.open(built.path, writable=True, lazy_refcounts=lazy) as disk:
        for _ in range(50):
            first = draw.randrange(200)
            length = draw.randrange(1, min(20, 200 - first) + 1)
            if draw.random() < 0.7:
                view[first : first + length] = [bytes([draw.randrange(256)]) * 512] * length
                disk.write(first * 512, b"".join(view[first : first + length]))
            else:
                view[first : first + length] = [bytes(512)] * length
                disk.discard(first * 512, length * 512)
        assert disk.read(0, 200 * 512) == b"".join(view)
    with qcow2.open(built.path) as disk:
        assert disk.read(0, 200 * 512) == b"".join(view)
    taken_out = tmp_path / "precious"
    command = ["qemu-img", "convert", "-l", "precious", "-f", "qcow2", "-O", "raw", built.path, taken_out]
    subprocess.run(command, check=True)
    assert taken_out.read_bytes() == precious


@pytest.mark.parametrize("what", ["table", "data"])
@pytest.mark.parametrize("count", [1, 2])
def test_flag_that_says_alone_is_not_believed_where_a_snapshot_refers_too(
    tmp_path: Path, what: str, count: int
) -> None:
    """As other writers leave it that die while they go back to a snapshot; with a count that is right, or too low."""
    built = snapshotted(tmp_path)
    active, l2 = number(built, 40), number(built, number(built, 40)) & OFFSET_MASK
    data = number(built, l2) & OFFSET_MASK
    built.poke(active, struct.pack(">Q", l2 | COPIED))
    if what == "table":
        built.set_refcount(l2, count)
    else:
        built.set_refcount(data, count)
        built.poke(l2, struct.pack(">Q", data | COPIED))
    with Daemon(built.path) as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(0, NEW)
        guest.write(CLUSTER, NEW)
        guest.flush()
    with qcow2.open(built.path, snapshot="precious") as precious:
        assert precious.read(0, 8 * CLUSTER) == OLD * 8
    with qcow2.open(built.path) as disk:
        assert disk.read(0, 8 * CLUSTER) == NEW * 2 + OLD * 6
