"""`check -r`: what QEMU finds clean afterwards, and what is not touched."""

import json
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

import qcow2
from tests.builder import Built, Recipe, build
from tests.builder.record import BITMAPS, CORRUPT, DIRTY
from tests.file.test_check import COPIED, DAMAGES, OFFSET, recipe
from tests.oracle import assert_clean, assert_same_disk, qemu_check, read_header
from tests.program import qcow2_tool, qcow2_tool_ok

REPAIRABLE = [
    "counted too low",
    "counted too high",
    "leaked",
    "copied flag missing",
    "two guests of one cluster",
    "no refcount block",
    "refcount block past the end",
    "refcount table past the end",
]


@pytest.mark.sample(5)
@pytest.mark.parametrize("cluster_bits", [9, 16, 21])
@pytest.mark.parametrize("kind", REPAIRABLE)
def test_qemu_finds_a_repaired_image_clean(tmp_path: Path, kind: str, cluster_bits: int) -> None:
    DAMAGES[kind](build(recipe(cluster_bits=cluster_bits), tmp_path / "a"))
    assert qcow2_tool("check", "-r", "all", tmp_path / "a").returncode == 0
    assert_clean(tmp_path / "a")


@pytest.mark.sample(2)
@pytest.mark.parametrize("cluster_bits", [9, 16, 21])
@pytest.mark.parametrize("kind", ["just past the end", "truncated"])
def test_what_the_file_does_not_have_is_not_called_sound(tmp_path: Path, kind: str, cluster_bits: int) -> None:
    """Zeros in its place would pass for it. qemu-img leaves the errors, too, and nobody serves a dirty one."""
    built = build(recipe(cluster_bits=cluster_bits), tmp_path / "a")
    DAMAGES[kind](built)
    path = built.path
    before = path.read_bytes()
    assert qcow2_tool("check", "-r", "all", path).returncode == 2
    assert path.read_bytes() == before
    assert qemu_check(path)[0] == 2
    with path.open("r+b") as file:
        file.seek(79)
        file.write(b"\1")
    with pytest.raises(qcow2.CorruptImage, match=r"not closed cleanly, and .* errors cannot be repaired"):
        qcow2.open(path, writable=True)


def test_a_place_for_no_snapshots_that_qemu_refuses_is_cleared(tmp_path: Path) -> None:
    """QEMU does not open such an image, not even to repair it."""
    built = build(Recipe(size=1 << 20), tmp_path / "a")
    built.poke(64, struct.pack(">Q", 1))
    assert qcow2_tool("check", built.path).returncode == 2
    assert qcow2_tool("check", "-r", "all", built.path).returncode == 0
    assert_clean(built.path)


def test_counts_that_fall_to_one_bring_the_flag_along(tmp_path: Path) -> None:
    """Else a leak that is mended is an error at the next check."""
    DAMAGES["counted too high"](build(recipe(), tmp_path / "a"))
    assert qcow2_tool("check", "-r", "leaks", tmp_path / "a").returncode == 0
    assert_clean(tmp_path / "a")


@pytest.mark.parametrize("kind", sorted(set(DAMAGES) - set(REPAIRABLE)))
def test_what_cannot_be_repaired_stays_corrupt(tmp_path: Path, kind: str) -> None:
    made = recipe()
    made.incompatible = DIRTY | CORRUPT
    DAMAGES[kind](build(made, tmp_path / "a"))
    assert qcow2_tool("check", "-r", "all", tmp_path / "a").returncode == 2
    assert read_header(tmp_path / "a").fields["incompatible_features"] == DIRTY | CORRUPT


@pytest.mark.parametrize("refcount_order", [3, 4, 6])
@pytest.mark.parametrize("cluster_bits", [9, 12, 16])
def test_a_disk_reads_the_same_after_its_refcounts_were_lost(
    tmp_path: Path, cluster_bits: int, refcount_order: int
) -> None:
    made = recipe(cluster_bits=cluster_bits, refcount_order=refcount_order)
    made.incompatible = DIRTY
    made.snapshot("one")
    made.data(0, b"newer")
    built = build(made, tmp_path / "a")
    for host_offset in built.refcount_block_offsets.values():
        built.poke(host_offset, bytes(made.cluster_size))
    qcow2_tool_ok("check", "-r", "all", tmp_path / "a")
    assert_clean(tmp_path / "a")
    assert_same_disk(tmp_path / "a", made.contents())
    assert not read_header(tmp_path / "a").is_dirty


def test_a_clean_image_is_not_changed(tmp_path: Path) -> None:
    built = build(recipe(), tmp_path / "a")
    before = built.path.read_bytes()
    qcow2_tool_ok("check", "-r", "all", tmp_path / "a")
    assert built.path.read_bytes() == before


def test_repairing_leaks_frees_and_raises_nothing(tmp_path: Path) -> None:
    built = build(recipe(), tmp_path / "a")
    DAMAGES["leaked"](built)
    built.set_refcount(built.l2(0) & OFFSET, 0)
    done = qcow2_tool("check", "-r", "leaks", "--output=json", tmp_path / "a")
    assert done.returncode == 2
    assert json.loads(done.stdout)["leaks-fixed"] == 1
    code, report = qemu_check(tmp_path / "a")
    assert (code, report.get("leaks", 0), report["corruptions"]) == (2, 0, 2)


@pytest.mark.parametrize("lazy", [False, True])
def test_what_a_dead_writer_had_set_aside_is_given_back(tmp_path: Path, lazy: bool) -> None:
    """Counted, in an image that is accurate, and space of the host."""
    path = tmp_path / "a"
    qcow2_tool_ok("create", "-o", f"lazy_refcounts={'on' if lazy else 'off'}", path, "64M")
    disk = qcow2.open(path, writable=True)
    for index in range(20):
        disk.write(index << 16, b"x" * 65536)
    disk.flush()
    disk.abandon()
    assert path.stat().st_size > 40 << 16
    qcow2_tool_ok("check", "-r", "all" if lazy else "leaks", path)
    assert path.stat().st_size < 30 << 16
    assert path.stat().st_blocks * 512 <= path.stat().st_size
    assert_clean(path)
    assert_same_disk(path, b"x" * (20 << 16) + bytes((64 << 20) - (20 << 16)))


def test_the_corrupt_bit_is_cleared_by_a_full_repair(tmp_path: Path) -> None:
    made = recipe()
    made.incompatible = CORRUPT
    DAMAGES["counted too low"](build(made, tmp_path / "a"))
    qcow2_tool_ok("check", "-r", "all", tmp_path / "a")
    assert read_header(tmp_path / "a").fields["incompatible_features"] == 0


def test_known_bitmaps_survive_and_unknown_promises_do_not(tmp_path: Path) -> None:
    made = recipe()
    made.autoclear = 1 << 40
    made.bitmaps.append(("b0", 16))
    DAMAGES["counted too low"](build(made, tmp_path / "a"))
    qcow2_tool_ok("check", "-r", "all", tmp_path / "a")
    assert read_header(tmp_path / "a").fields["autoclear_features"] == BITMAPS
    assert_clean(tmp_path / "a")


SNAPSHOT_DAMAGES = {
    "L1 table elsewhere": (0, struct.pack(">Q", 1 << 50)),
    "L1 table not aligned": (0, struct.pack(">Q", 0x12345)),
    "too much extra data": (36, struct.pack(">I", 1 << 31)),
    "zeroed": (0, bytes(64)),
}


@pytest.mark.parametrize("kind", SNAPSHOT_DAMAGES)
def test_what_a_lost_snapshot_may_hold_is_kept(tmp_path: Path, kind: str) -> None:
    """What the disk itself uses is put right; once the table is back so is the snapshot."""
    made = Recipe(size=1 << 20)
    made.data(0, b"data")
    made.data(2, b"more data")
    made.snapshot("one")
    made.data(1, b"more")
    built = build(made, tmp_path / "a")
    snapshots = struct.unpack(">Q", built.peek(64, 8))[0]
    offset, damage = SNAPSHOT_DAMAGES[kind]
    offset += snapshots
    old = built.peek(offset, len(damage))
    built.set_l2(1, built.l2(1) & ~COPIED)
    built.set_refcount(built.l2(1) & OFFSET, 0)
    built.poke(offset, damage)
    status = 1 if kind == "too much extra data" else 2
    for _ in range(2):
        done = qcow2_tool("check", "-r", "all", tmp_path / "a")
        assert done.returncode == status
        assert "may be in use, and are kept" in done.stderr
    assert qcow2_tool("check", "-r", "leaks", tmp_path / "a").returncode == status
    built.poke(offset, old)
    assert_clean(tmp_path / "a")
    assert_same_disk(tmp_path / "a", made.contents())


def test_what_a_lost_mapping_may_hold_is_kept(tmp_path: Path) -> None:
    """Even where the refcounts are counted anew: the cluster is still there when the entry is."""
    made = recipe()
    built = build(made, tmp_path / "a")
    old = built.l2(3)
    built.set_l2(3, old + 512)
    built.set_refcount_table(0, 0)
    assert qcow2_tool("check", "-r", "all", tmp_path / "a").returncode == 2
    built.set_l2(3, old)
    assert qcow2_tool("check", tmp_path / "a").returncode == 3  # clusters that nothing refers to are counted, too
    qcow2_tool_ok("check", "-r", "all", tmp_path / "a")
    assert_clean(tmp_path / "a")
    assert_same_disk(tmp_path / "a", made.contents())


@pytest.mark.parametrize("cluster_bits", [9, 16])
@pytest.mark.parametrize("kind", ["table", "block", "both"])
def test_refcounts_alone_that_were_cut_off_are_counted_anew(tmp_path: Path, kind: str, cluster_bits: int) -> None:
    made = recipe(cluster_bits=cluster_bits)
    built = build(made, tmp_path / "a")
    end = built.path.stat().st_size
    if kind != "table":
        built.set_refcount_table(0, end + built.recipe.cluster_size)
    if kind != "block":
        built.set_header(refcount_table_offset=end)
    qcow2_tool_ok("check", "-r", "all", tmp_path / "a")
    assert_clean(tmp_path / "a")
    assert_same_disk(tmp_path / "a", made.contents())


def test_an_l1_table_that_was_cut_off_is_not_called_sound(tmp_path: Path) -> None:
    built = build(recipe(), tmp_path / "a")
    built.set_header(l1_table_offset=built.path.stat().st_size + built.recipe.cluster_size)
    before = built.path.read_bytes()
    assert qcow2_tool("check", tmp_path / "a").returncode == 2
    assert qcow2_tool("check", "-r", "all", tmp_path / "a").returncode == 2
    assert built.path.read_bytes() == before
    assert qemu_check(tmp_path / "a")[0] == 2


def test_a_count_beyond_its_field_is_as_high_as_it_can_be(tmp_path: Path) -> None:
    """Else one that is raised while references are lost would wrap around to none."""
    made = recipe(refcount_order=0)
    built = build(made, tmp_path / "a")
    built.set_l2(9, built.l2(9) + 512)
    built.set_l2(3, built.l2(0))
    built.set_l2(6, built.l2(0))
    built.set_refcount(built.l2(0) & OFFSET, 0)
    assert qcow2_tool("check", "-r", "all", tmp_path / "a").returncode == 2
    assert built.refcount(built.l2(0) & OFFSET) == 1


@pytest.mark.parametrize(("cluster_bits", "nbytes"), [(9, 0), (16, 4), (9, 8), (16, 12)])
def test_snapshots_that_do_not_say_their_sizes_are_completed(tmp_path: Path, cluster_bits: int, nbytes: int) -> None:
    """Version 3 asks for 16 bytes of extra data; QEMU's check finds it, and its repair writes what ours does."""
    made = Recipe(size=1 << 20, cluster_bits=cluster_bits)
    made.data(0, b"data")
    for name in ("one", "two"):
        made.snapshot(name)
        made.data(1, name.encode())
    built = build(made, tmp_path / "a")
    shorten_extra(built, nbytes)
    shutil.copy(tmp_path / "a", tmp_path / "qemus")
    assert qemu_check(tmp_path / "a")[1]["corruptions"] == 2
    for size in (2 << 20, 1 << 19):
        with pytest.raises(qcow2.UnsupportedImage, match="does not say how long its disk is"):
            with qcow2.open(tmp_path / "a", writable=True) as disk:
                disk.resize(size, shrink=True)
    done = qcow2_tool("check", tmp_path / "a")
    assert (done.returncode, done.stderr.count("bytes of extra data, version 3 asks for 16")) == (2, 2)
    assert qcow2_tool("check", "-r", "leaks", tmp_path / "a").returncode == 2
    done = qcow2_tool("check", "-r", "all", "--output=json", tmp_path / "a")
    assert (done.returncode, json.loads(done.stdout)["corruptions-fixed"]) == (0, 2)
    assert_clean(tmp_path / "a")
    assert not read_header(tmp_path / "a").is_dirty
    assert_same_disk(tmp_path / "a", made.contents())
    subprocess.run(["qemu-img", "check", "-q", "-r", "all", tmp_path / "qemus"], check=True)
    assert listed(tmp_path / "a") == listed(tmp_path / "qemus")
    for name in ("one", "two"):
        for path in (tmp_path / "a", tmp_path / "qemus"):
            subprocess.run(["qemu-img", "convert", "-l", name, path, f"{path}.{name}"], check=True)
        assert (tmp_path / f"a.{name}").read_bytes() == (tmp_path / f"qemus.{name}").read_bytes()


def shorten_extra(built: Built, nbytes: int) -> None:
    """Leave *nbytes* of each snapshot's extra data."""
    count, offset = struct.unpack(">IQ", built.peek(60, 12))
    table = b""
    for _ in range(count):
        head = built.peek(offset, 40)
        id_size, name_size, extra_size = struct.unpack(">12xHH20xI", head)
        rest = built.peek(offset + 40, extra_size + id_size + name_size)
        entry = head[:36] + struct.pack(">I", nbytes) + rest[:nbytes] + rest[extra_size:]
        table += entry + bytes(-len(entry) % 8)
        offset += 40 + len(rest) + -(40 + len(rest)) % 8
    built.poke(struct.unpack(">Q", built.peek(64, 8))[0], table)


def listed(path: Path) -> object:
    info = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", path]))
    return [{key: each[key] for key in ("id", "name", "vm-state-size")} for each in info["snapshots"]]


@pytest.mark.parametrize("count", [1 << 17 | 2, 0xFFFFFFFF])
def test_a_number_of_snapshots_that_the_table_does_not_have_is_corrected(tmp_path: Path, count: int) -> None:
    sound = recipe(cluster_bits=16)
    sound.snapshot("one")
    sound.snapshot("two")
    built = build(sound, tmp_path / "a")
    before = built.path.read_bytes()
    built.poke(60, struct.pack(">I", count))
    done = qcow2_tool("check", built.path)
    assert (done.returncode, "the snapshot table has 2" in done.stdout + done.stderr) == (2, True)
    assert qcow2_tool("check", "-r", "all", built.path).returncode == 0
    assert built.path.read_bytes() == before
