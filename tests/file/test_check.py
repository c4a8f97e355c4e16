"""`check` sees what qemu-img sees: the same numbers on sound images and on damaged ones."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

import qcow2
from tests.builder import Built, Recipe, build
from tests.oracle import assert_clean, qemu_check, qemu_img
from tests.program import qcow2_tool, qcow2_tool_ok

COPIED = 1 << 63
OFFSET = 0x00FF_FFFF_FFFF_FE00


def recipe(version: int = 3, cluster_bits: int = 16, layout: str = "scattered", refcount_order: int = 4) -> Recipe:
    """Something of every kind of cluster."""
    made = Recipe(size=300 << cluster_bits, version=version, cluster_bits=cluster_bits, layout=layout)  # type: ignore[arg-type]
    made.refcount_order = refcount_order
    for index in range(0, 200, 3):
        made.data(index, bytes([index + 1]) * 100)
    if refcount_order:  # clusters that compressed data shares have more than one reference
        for index in range(210, 240):
            made.compressed(index, bytes([index]) * made.cluster_size)
    if version == 3:
        for index in range(1, 90, 9):
            made.zero(index)
            made.preallocated_zero(index + 1)
    return made


def ours(path: Path, *options: str) -> tuple[int, dict[str, object]]:
    done = qcow2_tool("check", "--output=json", *options, path)
    return done.returncode, json.loads(done.stdout)


@pytest.mark.sample(3)
@pytest.mark.parametrize("layout", ["packed", "reversed", "scattered"])
@pytest.mark.parametrize("refcount_order", [0, 3, 4, 6])
@pytest.mark.parametrize("cluster_bits", [9, 16, 21])
def test_a_sound_image_gets_qemus_report(tmp_path: Path, cluster_bits: int, refcount_order: int, layout: str) -> None:
    build(recipe(cluster_bits=cluster_bits, refcount_order=refcount_order, layout=layout), tmp_path / "a")
    report = ours(tmp_path / "a")
    assert report == qemu_check(tmp_path / "a")
    assert report[0] == 0


@pytest.mark.parametrize("output", ["human", "json"])
def test_quiet_is_as_quiet_as_qemu(tmp_path: Path, output: str) -> None:
    qcow2.create(tmp_path / "a", 1 << 20)
    words = "check", "-q", f"--output={output}", "-f", "qcow2", tmp_path / "a"
    assert qcow2_tool_ok(*words) == qemu_img(*words).stdout == ""


def test_version_2_snapshots_and_bitmaps_get_qemus_report(tmp_path: Path) -> None:
    old = recipe(version=2)
    snapshots = recipe()
    snapshots.snapshot("one")
    snapshots.data(0, b"newer")
    snapshots.snapshot("two")
    bitmaps = recipe()
    bitmaps.bitmaps.append(("b0", 16))
    for made in (old, snapshots, bitmaps):
        build(made, tmp_path / "a")
        report = ours(tmp_path / "a")
        assert report == qemu_check(tmp_path / "a")
        assert report[0] == 0


DAMAGES: dict[str, Callable[[Built], None]] = {
    "counted too low": lambda b: b.set_refcount(b.l2(0) & OFFSET, 0),
    "counted too high": lambda b: b.set_refcount(b.l2(0) & OFFSET, 5),
    "leaked": lambda b: b.set_l2(3, 0),
    "copied flag missing": lambda b: b.set_l2(3, b.l2(3) & ~COPIED),
    "reserved bit": lambda b: b.set_l2(3, b.l2(3) | 2),
    "just past the end": lambda b: b.set_l2(3, COPIED | b.path.stat().st_size),
    "two guests of one cluster": lambda b: b.set_l2(3, b.l2(0)),
    "data over the L1 table": lambda b: b.set_l2(3, COPIED | b.l1_offset),
    "no refcount block": lambda b: b.set_refcount_table(0, 0),
    "refcount block past the end": lambda b: b.set_refcount_table(0, 1 << 40),
    "refcount table past the end": lambda b: b.set_header(refcount_table_offset=1 << 44),
    "L2 table past the end": lambda b: b.set_l1(0, COPIED | 1 << 44),
    "far past the end": lambda b: b.set_l2(3, COPIED | 1 << 50),
    "L1 that points at itself": lambda b: b.set_l1(0, COPIED | b.l1_offset),
    "truncated": lambda b: b.truncate(b.path.stat().st_size - (3 << b.recipe.cluster_bits)),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_image_gets_qemus_report(tmp_path: Path, kind: str) -> None:
    DAMAGES[kind](build(recipe(), tmp_path / "a"))
    report = ours(tmp_path / "a")
    assert report == qemu_check(tmp_path / "a")
    assert report[0] in (2, 3)


def test_check_changes_nothing(tmp_path: Path) -> None:
    built = build(recipe(), tmp_path / "a")
    DAMAGES["counted too low"](built)
    before = built.path.read_bytes()
    ours(tmp_path / "a")
    assert built.path.read_bytes() == before


def test_an_overlap_that_refcounts_approve_is_corruption(tmp_path: Path) -> None:
    """Where qemu-img says clean: a data cluster and the L1 table share a cluster, and its refcount is 2."""
    built = build(recipe(), tmp_path / "a")
    built.set_refcount(built.l2(3) & OFFSET, 0)
    built.set_l2(3, built.l1_offset)
    built.set_refcount(built.l1_offset, 2)
    assert_clean(tmp_path / "a")
    assert ours(tmp_path / "a")[0] == 2


def test_a_loop_of_tables_ends(tmp_path: Path) -> None:
    """Every L1 entry points at one L2 table, the largest there is: it is read once."""
    made = Recipe(size=1 << 40, cluster_bits=16)
    made.data(0, b"data")
    built = build(made, tmp_path / "a")
    for index in range(1 << 11):
        built.set_l1(index, built.l2_offsets[0])
    assert ours(tmp_path / "a")[0] == 2


def test_a_table_that_data_shares_is_corrupt_however_high_it_is_counted(tmp_path: Path) -> None:
    """The count alone would be a leak, and the next write to the data would go through the table."""
    built = build(recipe(), tmp_path / "a")
    built.set_l2(3, built.l1_offset)
    built.set_refcount(built.l1_offset, 9)
    done = qcow2_tool("check", tmp_path / "a")
    assert done.returncode == 2
    assert f"tables overlap at {built.l1_offset:#x}" in done.stderr


def test_a_refcount_table_cut_off_in_its_last_cluster_is_repaired(tmp_path: Path) -> None:
    """It does not open; what is lost of it reads as zeros, so nothing else would tell."""
    made = recipe(layout="packed")
    built = build(made, tmp_path / "a")
    assert built.path.stat().st_size == built.refcount_table_offset + made.cluster_size
    built.truncate(built.refcount_table_offset + 512)
    done = qcow2_tool("check", tmp_path / "a")
    assert done.returncode == 2
    assert f"refcount table at {built.refcount_table_offset:#x} is cut off" in done.stderr
    assert qcow2_tool("check", "-r", "all", tmp_path / "a").returncode == 0
    assert_clean(tmp_path / "a")
    with qcow2.open(str(tmp_path / "a"), writable=True) as disk:
        assert disk.read(0, 100) == b"\1" * 100


def test_an_l2_table_that_the_disk_uses_twice_is_corrupt(tmp_path: Path) -> None:
    """Every count may be right; such an image does not open for writing, and check says why."""
    made = Recipe(size=1 << 20, cluster_bits=9)
    made.data(0, b"data")
    built = build(made, tmp_path / "a")
    built.set_l1(1, built.l2_offsets[0])
    assert qcow2_tool("check", "-r", "all", tmp_path / "a").returncode == 2
    done = qcow2_tool("check", tmp_path / "a")
    assert done.returncode == 2
    assert f"L1 table entry 1 shares its L2 table at {built.l2_offsets[0]:#x}" in done.stderr


def cut_inside_a_table(path: Path, nentries: int) -> Built:
    """An image whose file ends behind so many entries of its L2 table, which has four."""
    made = Recipe(size=1 << 20)
    for index in range(4):
        made.data(index, b"data")
    built = build(made, path)
    end = built.path.stat().st_size
    built.poke(end, built.peek(built.l2_offsets[0], made.cluster_size))
    built.set_l1(0, COPIED | end)
    built.set_refcount(end, 1)
    built.set_refcount(built.l2_offsets[0], 0)
    assert_clean(path)
    built.truncate(end + 8 * nentries)
    return built


@pytest.mark.parametrize("mode", ["leaks", "all"])
def test_what_a_table_cut_off_in_its_last_cluster_may_refer_to_is_kept(tmp_path: Path, mode: str) -> None:
    """What is lost of it reads as zeros: two of the four data clusters seem to leak, to qemu-img, too."""
    built = cut_inside_a_table(tmp_path / "a", 2)
    assert ours(built.path)[0] == 3
    assert qemu_check(built.path)[0] == 3
    lost = (built.path.stat().st_size >> 16) - 1
    counts = [built.refcount(cluster << 16) for cluster in range(lost)]
    qcow2_tool("check", "-r", mode, built.path)
    assert [built.refcount(cluster << 16) for cluster in range(lost)] == counts
    assert "the file ends inside a table" in qcow2_tool("check", built.path).stderr


def test_the_end_of_a_table_that_was_never_written_leaks_nothing(tmp_path: Path) -> None:
    built = cut_inside_a_table(tmp_path / "a", 4)
    assert ours(built.path) == qemu_check(built.path)
    assert ours(built.path)[0] == 0


@pytest.mark.parametrize(("lost", "status"), [(511, 0), (512, 2), (4096, 2)])
def test_a_compressed_stream_whose_last_sector_is_gone_is_lost(tmp_path: Path, lost: int, status: int) -> None:
    """Where qemu-img says clean: the sectors that an entry names lie in a cluster that begins in the file."""
    path = tmp_path / "a"
    qcow2.create(path, 1 << 20)
    with qcow2.open(path, writable=True) as disk:
        disk.write_compressed(0, Random(1).randbytes(40000).ljust(65536, b"\0"))
    (word,) = struct.unpack_from(">Q", path.read_bytes(), 0x40000)  # the L2 table
    host_offset, sectors = word & (1 << 54) - 1, (word >> 54 & 0xFF) + 1
    os.truncate(path, (host_offset // 512 + sectors) * 512 - lost)
    assert ours(path)[0] == status
    assert_clean(path)
