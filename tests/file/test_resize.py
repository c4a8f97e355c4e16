"""A disk that grows: the L1 table with it, zeros where it is new; qemu-img is the judge."""

import json
import os
from pathlib import Path

import pytest

import qcow2
from tests.bitmapreader import bitmaps_of
from tests.oracle import assert_clean, assert_same_disk, held_by_qemu, qemu_img, qemu_io, qemu_read, read_header, sha256
from tests.program import qcow2_tool, qcow2_tool_ok

SMALL = 1000 << 10  # neither a whole cluster of 64 KiB nor, with clusters of 512 bytes, a whole L2 table


def created(path: Path, size: int, **options: object) -> Path:
    given = ",".join(f"{name}={value}" for name, value in options.items())
    qemu_img("create", "-q", "-f", "qcow2", *(["-o", given] if given else []), path, str(size))
    return path


def mapped(path: Path) -> list[dict[str, object]]:
    """What QEMU's map says, but for which host clusters hold it."""
    rows = json.loads(qemu_img("map", "--output=json", path).stdout)
    return [{name: value for name, value in row.items() if name != "offset"} for row in rows]


def copied(path: Path) -> Path:
    """The same image beside it, for QEMU to do the same with."""
    other = path.with_name(f"{path.name}.by-qemu")
    other.write_bytes(path.read_bytes())
    return other


def resize_refused(path: Path, *arguments: str) -> str:
    """Try to resize, which is refused on one line without touching the image; the line."""
    before = sha256(path)
    done = qcow2_tool("resize", path, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert sha256(path) == before
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    "format_options",
    [{"compat": "0.10"}, {"compat": "1.1"}, {"compat": "1.1", "lazy_refcounts": "on"}],
    ids=["v2", "accurate", "lazy"],
)
@pytest.mark.parametrize(("cluster_size", "larger"), [(512, (100 << 20, 3 << 30)), (65536, (100 << 20, 6 << 40))])
def test_a_disk_grows_again_and_again(
    tmp_path: Path, format_options: dict[str, str], cluster_size: int, larger: tuple[int, int]
) -> None:
    path = created(tmp_path / "a", SMALL, cluster_size=cluster_size, **format_options)
    qemu_io(path, "write -P 7 900k 100k")
    qemu_img("convert", "-O", "raw", path, tmp_path / "raw")
    for index, size in enumerate(larger):
        assert qcow2_tool_ok("resize", path, str(size)) == "Image resized.\n"
        os.truncate(tmp_path / "raw", size)
        assert_clean(path)
        qemu_img("compare", "-f", "qcow2", "-F", "raw", path, tmp_path / "raw")
        for file, kind in [(path, "qcow2"), (tmp_path / "raw", "raw")]:
            with qcow2.open(str(file), writable=True, format=kind) as disk:
                assert disk.size == size
                disk.write(size - 512, bytes([index + 1]) * 512)
        assert_clean(path)
        qemu_img("compare", "-f", "qcow2", "-F", "raw", path, tmp_path / "raw")
    assert read_header(path).fields["l1_size"] * 8 > cluster_size


@pytest.mark.sample(1)
@pytest.mark.parametrize("refcount_bits", [1, 16, 64])
def test_the_longest_l1_table_moves_the_refcount_table_as_well(tmp_path: Path, refcount_bits: int) -> None:
    path = created(tmp_path / "a", SMALL, cluster_size=512, refcount_bits=refcount_bits)
    qemu_io(path, "write -P 7 0 1000k")
    qcow2_tool_ok("resize", path, "128G")
    assert read_header(path).fields["l1_size"] * 8 == 32 << 20
    assert_clean(path)
    assert "identical" in qemu_img("compare", "-f", "qcow2", "-F", "qcow2", path, path).stdout


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
@pytest.mark.parametrize(
    "base_size", [SMALL - 8192, SMALL + 8192, 3 << 20], ids=["shorter", "a little longer", "longer"]
)
def test_what_the_backing_file_holds_past_the_old_end_never_shows(
    tmp_path: Path, compat: str, base_format: str, base_size: int
) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"base" * (base_size // 4))
    if base_format == "qcow2":
        qemu_img("convert", "-f", "raw", "-O", "qcow2", base, tmp_path / "converted")
        (tmp_path / "converted").rename(base)
    path = tmp_path / "a"
    given = f"compat={compat},backing_file=base,backing_fmt={base_format}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", given, path, str(SMALL))
    qemu_io(path, "write -P 7 990k 1k")  # the rest of this last cluster comes from the backing file
    expected = qemu_read(path)
    qcow2_tool_ok("resize", path, "2M")
    assert_clean(path)
    assert_same_disk(path, expected.ljust(2 << 20, b"\0"))


def test_zeros_over_a_longer_backing_file_are_what_qemu_leaves_there(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"base" * (1 << 20))
    path = created(tmp_path / "a", SMALL, backing_file="base", backing_fmt="raw")
    other = copied(path)
    qcow2_tool_ok("resize", "-q", path, "3M")
    qemu_img("resize", "-q", other, "3M")
    assert mapped(path) == mapped(other)


def test_what_tables_map_past_the_old_end_never_shows(tmp_path: Path) -> None:
    path = created(tmp_path / "a", 2 << 20)
    qemu_io(path, "write -P 7 0 2M")
    with path.open("r+b") as file:  # as if a careless writer had made the disk shorter
        file.seek(24)
        file.write((SMALL + 512).to_bytes(8, "big"))
    qcow2_tool_ok("resize", path, "2M")
    assert_clean(path)
    assert_same_disk(path, b"\7" * (SMALL + 512) + bytes((2 << 20) - SMALL - 512))


@pytest.mark.parametrize(("text", "size"), [("+1M", SMALL + (1 << 20)), ("+0", SMALL), ("2M", 2 << 20)])
def test_sizes_mean_what_they_mean_to_qemu(tmp_path: Path, text: str, size: int) -> None:
    path = created(tmp_path / "a", SMALL)
    other = copied(path)
    assert qcow2_tool_ok("resize", path, text) == qemu_img("resize", "-f", "qcow2", other, text).stdout
    assert read_header(path).fields["size"] == read_header(other).fields["size"] == size


def test_a_size_is_rounded_up_to_a_sector(tmp_path: Path) -> None:
    path = created(tmp_path / "a", SMALL)
    with qcow2.open(path, "r+") as disk:
        disk.resize(SMALL + 1)
    assert read_header(path).fields["size"] == SMALL + 512
    assert_clean(path)


def test_snapshots_of_version_3_keep_what_they_hold(tmp_path: Path) -> None:
    path = created(tmp_path / "a", SMALL, cluster_size=512)
    qemu_io(path, "write -P 7 0 1000k")
    qemu_img("snapshot", "-c", "one", path)
    qemu_io(path, "write -P 8 0 500k")
    qcow2_tool_ok("resize", path, "100M")
    assert_clean(path)
    assert_same_disk(path, (b"\10" * (500 << 10) + b"\7" * (500 << 10)).ljust(100 << 20, b"\0"))
    assert qemu_read(path, snapshot="one")[:SMALL] == b"\7" * SMALL


def test_snapshots_of_version_2_are_refused_as_by_qemu(tmp_path: Path) -> None:
    path = created(tmp_path / "a", SMALL, compat="0.10")
    qemu_img("snapshot", "-c", "one", path)
    assert "snapshots" in resize_refused(path, "2M")
    assert qemu_img("resize", "-q", path, "2M", check=False).returncode == 1


@pytest.mark.parametrize("granularity", [512, 65536])
@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_bitmaps_fit_the_disk_and_hold_what_is_new(tmp_path: Path, cluster_size: int, granularity: int) -> None:
    path = created(tmp_path / "a", SMALL, cluster_size=cluster_size)
    for name in ("changes", "other"):
        qemu_img("bitmap", "--add", "-g", granularity, path, name)
    qemu_img("bitmap", "--add", "--disable", "-g", granularity, path, "off")
    qemu_io(path, "write 0 512")
    old = {0, *range(SMALL // granularity, (64 << 20) // granularity)}
    for size, held in (("64M", 64 << 20), ("640k", 640 << 10), ("2M", 2 << 20)):
        qcow2_tool_ok("resize", "--shrink", path, size)
        old = {bit for bit in old if bit * granularity < held}
        if size == "2M":
            old |= set(range((640 << 10) // granularity, held // granularity))
        assert [each.dirty for each in bitmaps_of(path).values()] == [old, old, set()]
        assert_clean(path)
        qemu_io(path, "write 0 512")
        assert all(each.is_valid for each in bitmaps_of(path).values())


def test_a_size_that_no_l1_table_maps_is_refused_with_the_limit(tmp_path: Path) -> None:
    path = created(tmp_path / "a", SMALL, cluster_size=512)
    line = resize_refused(path, str((128 << 30) + 1))
    assert "137438953473" in line
    assert "33554432" in line


@pytest.mark.parametrize("text", ["", "+", "+-1M", "+++1M", "1X", "9E"])
def test_what_is_no_size_is_refused(tmp_path: Path, text: str) -> None:
    assert "size" in resize_refused(created(tmp_path / "a", SMALL), text)


def test_an_image_in_use_is_refused(tmp_path: Path) -> None:
    path = created(tmp_path / "a", SMALL)
    with held_by_qemu(path):
        assert "lock" in resize_refused(path, "2M")


def test_a_disk_in_use_by_this_program_grows_under_it(tmp_path: Path) -> None:
    path = created(tmp_path / "a", SMALL, cluster_size=512, lazy_refcounts="on")
    with qcow2.open(str(path), writable=True) as disk:
        disk.write(SMALL - 512, b"o" * 512)
        disk.resize(10 << 20)
        assert disk.size == 10 << 20
        assert disk.read(SMALL - 512, 1024) == b"o" * 512 + bytes(512)
        disk.write((10 << 20) - 512, b"n" * 512)
        assert disk.read((10 << 20) - 512, 512) == b"n" * 512
    assert_clean(path)
    content = bytes(SMALL - 512) + b"o" * 512
    assert_same_disk(path, content.ljust((10 << 20) - 512, b"\0") + b"n" * 512)


def test_a_read_only_disk_does_not_grow(tmp_path: Path) -> None:
    path = created(tmp_path / "a", SMALL)
    with qcow2.open(str(path)) as disk, pytest.raises(OSError, match="read-only"):
        disk.resize(2 << 20)


def test_raw_disk_grows_and_shrinks_only_if_told(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\1" * SMALL)
    with qcow2.open(str(tmp_path / "a"), format="raw", writable=True) as disk:
        disk.resize(2 << 20)
        with pytest.raises(ValueError, match="can only grow"):
            disk.resize(SMALL)
        assert disk.read((2 << 20) - 512, 512) == bytes(512)
    assert (tmp_path / "a").read_bytes() == (b"\1" * SMALL).ljust(2 << 20, b"\0")
    with qcow2.open(str(tmp_path / "a"), format="raw", writable=True) as disk:
        disk.resize(1024, shrink=True)
    assert (tmp_path / "a").read_bytes() == b"\1" * 1024


@pytest.mark.parametrize("preallocation", ["off", "falloc", "full"])
def test_a_raw_file_is_as_long_as_it_was_told(tmp_path: Path, preallocation: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"\1" * 1000)
    with qcow2.open(path, "r+", format="raw") as disk:
        disk.resize(1500, preallocation=preallocation)
        assert disk.size == 1536
        assert disk.read(0, 1536) == b"\1" * 1000 + bytes(536)
    assert path.read_bytes() == b"\1" * 1000 + bytes(500)
    with qcow2.open(path, "r+", format="raw") as disk:
        disk.resize(999, shrink=True)
        assert disk.size == 1024
    assert path.read_bytes() == b"\1" * 999


def test_a_raw_file_loses_nothing_of_its_last_sector_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"\1" * 1536)
    with qcow2.open(path, "r+", format="raw") as disk:
        disk.resize(1500)
    assert path.read_bytes() == b"\1" * 1536
