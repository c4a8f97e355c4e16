"""Images whose snapshots, or the counts of what those hold, are not what they should be; and the limits of ours."""

import struct
from pathlib import Path

import pytest

import qcow2
from qcow2.engine import metadata
from tests.builder import Built, Recipe, build
from tests.builder.record import OFFSET_MASK
from tests.oracle import assert_clean
from tests.program import qcow2_tool

CLUSTER = 65536
SIZE = 64 * CLUSTER
OLD, NEW = b"\7" * CLUSTER, b"\x09" * CLUSTER
L1_SIZE, DISK_SIZE = 8, 48  # where they are in an entry of the snapshot table
MAX_L1_ENTRIES = (32 << 20) // 8
MAX_SIZE = MAX_L1_ENTRIES * (CLUSTER // 8 * CLUSTER)


def snapshotted(path: Path, *names: str) -> Built:
    recipe = Recipe(size=SIZE)
    for cluster in range(4):
        recipe.data(cluster, OLD)
    for name in names:
        recipe.snapshot(name)
    return build(recipe, path)


def say(built: Built, field: int, packed: bytes) -> None:
    """Let the first snapshot say so."""
    (table,) = struct.unpack(">Q", built.peek(64, 8))
    built.poke(table + field, packed)


def test_what_counts_too_low_is_not_overwritten_once_one_snapshot_is_left(tmp_path: Path) -> None:
    recipe = Recipe(size=SIZE)
    for cluster in range(4):
        recipe.data(cluster, OLD)
    recipe.snapshot("s1")
    recipe.snapshot("s2")
    recipe.data(5, NEW)  # the disk has an L2 table of its own
    built = build(recipe, tmp_path / "disk")
    for cluster in range(4):
        built.set_refcount(built.l2(cluster) & OFFSET_MASK, 1)
    with qcow2.open(built.path, writable=True) as disk:
        disk.delete_snapshot("s2")
        disk.write(0, NEW * 2)
    with qcow2.open(built.path, writable=True) as disk:
        disk.write(2 * CLUSTER, NEW * 2)
        assert disk.read(0, 4 * CLUSTER) == NEW * 4
    with qcow2.open(built.path, snapshot="s1") as disk:
        assert disk.read(0, 4 * CLUSTER) == OLD * 4


def test_cluster_that_two_entries_of_a_table_share_is_not_overwritten_once_no_snapshot_is_left(tmp_path: Path) -> None:
    recipe = Recipe(size=SIZE)
    recipe.data(0, OLD)
    recipe.view[1] = recipe.view[0]
    recipe.snapshot("s1")
    recipe.data(5, NEW)  # the disk has an L2 table of its own
    built = build(recipe, tmp_path / "disk")
    with qcow2.open(built.path, writable=True) as disk:
        disk.delete_snapshot("s1")
    assert_clean(built.path)
    with qcow2.open(built.path, writable=True) as disk:
        disk.write(0, NEW)
        assert disk.read(0, 2 * CLUSTER) == NEW + OLD


def test_what_an_unsound_l1_entry_leads_to_is_no_table_whose_flags_come_back(tmp_path: Path) -> None:
    recipe = Recipe(size=2 * (CLUSTER // 8) * CLUSTER)
    recipe.data(1, OLD)
    recipe.snapshot("s1")
    recipe.data(0, OLD)
    recipe.data(2, NEW)
    built = build(recipe, tmp_path / "disk")
    data = built.l2(0) & OFFSET_MASK
    built.poke(data + 1024, struct.pack(">Q", built.l2(2) & OFFSET_MASK))
    built.set_l1(1, data + 512 | 1 << 63)
    before = built.peek(data, CLUSTER)
    with qcow2.open(built.path, writable=True) as disk:
        disk.delete_snapshot("s1")
    assert built.peek(data, CLUSTER) == before


@pytest.mark.parametrize(
    ("field", "packed"),
    [
        (L1_SIZE, struct.pack(">I", MAX_L1_ENTRIES + 1)),
        (L1_SIZE, struct.pack(">I", (1 << 32) - 1)),
        (DISK_SIZE, struct.pack(">Q", MAX_SIZE + 512)),
        (DISK_SIZE, struct.pack(">Q", 1 << 60)),
        (DISK_SIZE, struct.pack(">Q", (1 << 64) - 1)),
    ],
)
def test_snapshot_of_a_disk_that_is_too_large_is_refused(tmp_path: Path, field: int, packed: bytes) -> None:
    built = snapshotted(tmp_path / "disk", "huge")
    say(built, field, packed)
    built.truncate(33 << 30)
    with pytest.raises(qcow2.UnsupportedImage, match=r"'huge'.* limit"):
        qcow2.open(built.path, snapshot="huge")
    with qcow2.open(built.path, writable=True) as disk:
        with pytest.raises(qcow2.UnsupportedImage, match=r"'huge'.* limit"):
            disk.apply_snapshot("huge")
        with pytest.raises(qcow2.UnsupportedImage, match=r"'huge'.* limit"):
            disk.delete_snapshot("huge")
        disk.write(0, NEW)
    with qcow2.open(built.path) as disk:
        assert disk.read(0, 2 * CLUSTER) == NEW + OLD


def test_downgrade_does_not_read_an_l1_table_that_is_too_large(tmp_path: Path) -> None:
    built = snapshotted(tmp_path / "disk", "huge")
    say(built, L1_SIZE, struct.pack(">I", MAX_L1_ENTRIES + 1))
    built.truncate(1 << 30)
    done = qcow2_tool("amend", "-o", "compat=0.10", built.path)
    assert done.returncode == 1
    assert "'huge'" in done.stderr
    assert "limit" in done.stderr


def test_disk_of_a_snapshot_is_whole_sectors(tmp_path: Path) -> None:
    built = snapshotted(tmp_path / "disk", "odd")
    say(built, DISK_SIZE, struct.pack(">Q", SIZE - 100))
    with qcow2.open(built.path, writable=True) as disk:
        disk.apply_snapshot("odd")
        assert disk.size == SIZE - 512
        disk.write(disk.size - 512, b"e" * 512)
    with qcow2.open(built.path) as disk:
        assert disk.size == SIZE - 512
        assert disk.read(disk.size - 512, 512) == b"e" * 512
    assert_clean(built.path)


def test_snapshot_with_which_no_writer_would_open_the_image_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "MAX_SNAPSHOT_CLUSTERS", 6)
    path = snapshotted(tmp_path / "disk").path
    with qcow2.open(path, writable=True) as disk:
        disk.create_snapshot("first")
        disk.write(0, NEW)
        disk.create_snapshot("second")
        disk.write(0, OLD)
        with pytest.raises(qcow2.UnsupportedImage, match="limit of 6 clusters"):
            disk.create_snapshot("third")
        disk.write(CLUSTER, NEW)
    with qcow2.open(path, writable=True) as disk:
        assert [each.name for each in disk.snapshots()] == ["first", "second"]
        disk.delete_snapshot("first")
        disk.create_snapshot("third")
        assert disk.read(0, 2 * CLUSTER) == OLD + NEW
    assert_clean(path)


def test_snapshot_whose_l1_table_is_too_short_has_lost_something(tmp_path: Path) -> None:
    """What the lost entries led to leaks, says qemu-img: a repair must not free it, and no disk be half of zeros."""
    recipe = Recipe(size=SIZE, cluster_bits=12)
    recipe.data(0, b"first")
    recipe.data(600, b"second")  # of another L2 table
    recipe.snapshot("short")
    del recipe.view[600]
    built = build(recipe, tmp_path / "disk")
    assert_clean(built.path)
    say(built, L1_SIZE, struct.pack(">I", 1))
    counts = [built.refcount(offset) for offset in range(0, built.path.stat().st_size, 4096)]
    done = qcow2_tool("check", "-r", "all", built.path)
    assert done.returncode == 2
    assert "'short') has 1 entries, too few for 4194304 bytes" in done.stderr
    assert [built.refcount(offset) for offset in range(0, built.path.stat().st_size, 4096)] == counts
    with qcow2.open(built.path, writable=True) as disk:
        with pytest.raises(qcow2.CorruptImage, match="'short' is too short for 4194304 bytes"):
            disk.apply_snapshot("short")
        assert disk.read(0, 5) == b"first"
