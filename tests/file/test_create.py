"""`create`: images that QEMU finds clean, of every shape, and never a half-made one."""

import itertools
from pathlib import Path

import pytest

from qcow2.driver.file import HostFile, run
from qcow2.engine.create import Options, Preallocation, create
from qcow2.error import UnsupportedImage
from qcow2.format.header import load_header
from tests.crash.driver import CrashDriver, SimulatedFile, points
from tests.oracle import assert_clean, assert_same_disk, qemu_img, read_header
from tests.program import qcow2_tool, qcow2_tool_ok

SIZES = {9: (0, 512, 1 << 20), 12: (512, 5 << 20), 16: (0, 1000 * 512, 10 << 20), 21: (512, 33 << 20)}
SHAPES = [(bits, order) for bits, order in itertools.product(SIZES, (0, 2, 4, 6))]


@pytest.mark.parametrize("preallocation", [Preallocation.OFF, Preallocation.METADATA])
@pytest.mark.parametrize(("cluster_bits", "refcount_order"), SHAPES)
def test_qemu_finds_every_shape_clean(
    tmp_path: Path, cluster_bits: int, refcount_order: int, preallocation: Preallocation
) -> None:
    for size in SIZES[cluster_bits]:
        options = Options(size, cluster_bits=cluster_bits, refcount_order=refcount_order, preallocation=preallocation)
        with HostFile.open(str(tmp_path / "a"), create=True) as file:
            run(create(file, options))
        assert_clean(tmp_path / "a")


@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_a_created_disk_reads_as_zeros(tmp_path: Path, compat: str, preallocation: str) -> None:
    options = f"compat={compat},preallocation={preallocation}"
    qcow2_tool_ok("create", "-q", "-o", options, tmp_path / "a", "3M")
    assert_clean(tmp_path / "a")
    assert_same_disk(tmp_path / "a", bytes(3 << 20))


def test_falloc_reserves_the_space(tmp_path: Path) -> None:
    qcow2_tool_ok("create", "-q", "-o", "preallocation=falloc", tmp_path / "a", "3M")
    assert (tmp_path / "a").stat().st_blocks * 512 >= 3 << 20


def test_an_old_image_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "a"
    qcow2_tool_ok("create", "-q", "-o", "preallocation=full", path, "8M")
    qcow2_tool_ok("create", "-q", path, "1M")
    assert path.stat().st_size < 1 << 20
    assert_clean(path)


def test_an_overlay_takes_its_size_from_the_backing_file(tmp_path: Path) -> None:
    qcow2_tool_ok("create", "-q", tmp_path / "base", "5M")
    qcow2_tool_ok("create", "-q", "-b", "base", "-F", "qcow2", tmp_path / "a")
    header = read_header(tmp_path / "a")
    assert (header.fields["size"], header.backing) == (5 << 20, "base")


def test_an_image_is_not_its_own_backing_file(tmp_path: Path) -> None:
    qcow2_tool_ok("create", "-q", tmp_path / "a", "1M")
    done = qcow2_tool("create", "-b", "a", "-F", "qcow2", tmp_path / "a")
    assert done.returncode == 1
    assert "its own backing file" in done.stderr


@pytest.mark.parametrize(
    ("written", "nbytes"), [("512", 512), ("1k", 1024), ("1.5M", 3 << 19), ("10G", 10 << 30), ("1000", 1024)]
)
def test_sizes_are_understood(tmp_path: Path, written: str, nbytes: int) -> None:
    qcow2_tool_ok("create", "-q", tmp_path / "a", written)
    assert read_header(tmp_path / "a").fields["size"] == nbytes


def test_what_is_announced_is_what_qemu_img_announces(tmp_path: Path) -> None:
    options = ["-f", "qcow2", "-o", "lazy_refcounts=on,cluster_size=4k", tmp_path / "a", "1.5G"]
    theirs = qemu_img("create", *options).stdout
    assert qcow2_tool_ok("create", *options) == theirs


@pytest.mark.parametrize("cluster_size", [512, 1024, 4096, 65536])
def test_small_clusters_keep_room_for_a_backing_name(tmp_path: Path, cluster_size: int) -> None:
    qcow2_tool_ok("create", "-q", "-o", f"cluster_size={cluster_size}", tmp_path / "a", "1M")
    qcow2_tool_ok("rebase", "-u", "-b", "x" * 200, "-F", "raw", tmp_path / "a")


def test_a_death_while_creating_leaves_no_image_that_opens() -> None:
    old = SimulatedFile("a", {}, 0)
    CrashDriver().run(create(old, Options(1 << 20, cluster_bits=9)))
    file, driver = old.copy(), CrashDriver()
    driver.run(create(file, Options(2 << 20, cluster_bits=9, lazy_refcounts=True)))
    for point in points(driver.journal, old, file):
        state = point.after_kill()
        try:
            header = CrashDriver().run(load_header(state))
        except UnsupportedImage:
            continue  # no magic: no image
        assert state.content() in (old.content(), file.content()), header


@pytest.mark.parametrize("options", ["compat=1.1", "compat=0.10", "cluster_size=512", "lazy_refcounts=on"])
def test_a_disk_of_nothing_takes_no_more_than_is_measured_and_grows(tmp_path: Path, options: str) -> None:
    path = tmp_path / "disk"
    qcow2_tool_ok("create", "-o", options, path, "0")
    assert_clean(path)
    measured = qcow2_tool_ok("measure", "-O", "qcow2", "-o", options, "--size", "0")
    assert f"fully allocated size: {path.stat().st_size}\n" in measured
    qcow2_tool_ok("resize", path, "1M")
    assert_clean(path)
    assert_same_disk(path, bytes(1 << 20))
