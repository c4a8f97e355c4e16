"""`create`: images that QEMU finds clean, of every shape, and never a half-made one."""

import itertools
import os
import struct
import subprocess
from pathlib import Path

import pytest

import qcow2
from qcow2.driver.file import HostFile, run
from qcow2.engine.create import Options, create
from qcow2.engine.plain import Preallocation
from qcow2.error import UnsupportedImage
from qcow2.format.header import load_header
from tests.crash.driver import CrashDriver, SimulatedFile, points
from tests.oracle import assert_clean, assert_same_disk, qemu_img, read_header
from tests.program import TIMEOUT, TOOL, qcow2_tool, qcow2_tool_ok
from tests.program import run as run_program

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


@pytest.fixture
def chain(tmp_path: Path) -> dict[Path, bytes]:
    """mid over base, whose data is in another file, and what the files hold."""
    qcow2_tool_ok("create", "-q", "-o", "data_file=data", tmp_path / "base", "1M")
    qcow2_tool_ok("create", "-q", "-b", "base", "-F", "qcow2", tmp_path / "mid")
    os.link(tmp_path / "base", tmp_path / "same")
    with qcow2.open(tmp_path / "base", writable=True) as disk:
        disk.write(0, b"x" * 5000)
    return {path: path.read_bytes() for path in tmp_path.iterdir()}


DATA_FILE = "data_file={},data_file_use=empty"


@pytest.mark.parametrize(
    "words",
    [
        ["-b", "mid", "-F", "qcow2", "base"],
        ["-b", "mid", "-F", "qcow2", "same", "1M"],
        ["-b", "mid", "-F", "qcow2", "data"],
        ["-b", "base", "-F", "qcow2", "-o", DATA_FILE.format("base"), "new"],
        ["-b", "base", "-F", "raw", "-o", DATA_FILE.format("same"), "new"],
        ["-b", "mid", "-F", "qcow2", "-o", DATA_FILE.format("data"), "new"],
        ["-u", "-b", "base", "-F", "qcow2", "same", "1M"],
        ["-u", "-b", "base", "-F", "raw", "-o", DATA_FILE.format("base"), "new", "1M"],
    ],
    ids=" ".join,
)
def test_what_a_new_image_would_rest_on_is_left_alone(
    tmp_path: Path, chain: dict[Path, bytes], words: list[str]
) -> None:
    done = run_program(TOOL, "create", *words, cwd=tmp_path)
    assert done.returncode == 1
    assert "rests on it" in done.stderr or "its own backing file" in done.stderr
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == chain


def test_below_an_image_that_does_not_say_its_format_its_file_is_known(tmp_path: Path) -> None:
    qcow2_tool_ok("create", "-q", tmp_path / "base", "1M")
    header, place = bytearray((tmp_path / "base").read_bytes()), 2000
    header[8:20] = struct.pack(">QI", place, len(b"base"))  # as old programs wrote it
    header[place : place + 4] = b"base"
    (tmp_path / "mid").write_bytes(header)
    before = (tmp_path / "base").read_bytes()
    done = qcow2_tool("create", "-b", "mid", "-F", "qcow2", tmp_path / "base")
    assert done.returncode == 1
    assert "rests on it" in done.stderr
    assert (tmp_path / "base").read_bytes() == before


def test_of_a_backing_file_nobody_looks_at_only_the_name_counts(tmp_path: Path) -> None:
    qcow2_tool_ok("create", "-q", tmp_path / "base", "1M")
    qcow2_tool_ok("create", "-q", "-b", "base", "-F", "qcow2", tmp_path / "mid")
    qcow2_tool_ok("create", "-q", "-u", "-b", "nowhere", "-F", "qcow2", tmp_path / "new", "1M")
    (tmp_path / "base").unlink()
    assert qcow2_tool("create", "-q", "-b", "mid", "-F", "qcow2", tmp_path / "base", "1M").returncode == 1
    assert not (tmp_path / "base").exists()
    qcow2_tool_ok("create", "-q", "-u", "-b", "mid", "-F", "qcow2", tmp_path / "top", "1M")


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


@pytest.mark.parametrize("words", ["create NAME 1M", "create -f raw NAME 1M", "convert -O qcow2 source NAME"])
def test_a_link_that_leads_to_nothing_says_where_the_image_is(tmp_path: Path, words: str) -> None:
    link, place = tmp_path / "link", tmp_path / "elsewhere" / "image"
    place.parent.mkdir()
    link.symlink_to("elsewhere/image")
    qcow2.create(tmp_path / "source", 1 << 20)
    command = [
        tmp_path / word if word in ("source", "link") else word for word in words.replace("NAME", "link").split()
    ]
    qcow2_tool_ok(*command)
    assert link.is_symlink()
    assert place.is_file()
    place.unlink()
    limited = ["prlimit", "--fsize=100", TOOL, *command]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, place.exists(), link.is_symlink()) == (1, False, True)
    assert "File too large" in done.stderr


def test_a_link_to_where_nothing_can_be_is_named(tmp_path: Path) -> None:
    for name, leads in (("gone", "missing/image"), ("round", "round")):
        (tmp_path / name).symlink_to(leads)
        done = qcow2_tool("create", tmp_path / name, "1M")
        assert done.returncode == 1
        assert done.stderr.startswith(f"qcow2: {tmp_path / name}: ")
