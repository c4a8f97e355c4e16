"""A disk that becomes shorter: what is cut off is gone, what is left is as it was, also wherever it is interrupted."""

import os
import random
import struct
import subprocess
from pathlib import Path

import pytest

import qcow2
from qcow2.driver.buffer import MemoryBuffer
from qcow2.engine.root import Root
from tests.crash.driver import CrashDriver, SimulatedFile
from tests.crash.images import KINDS, check_image, open_image, read_all, start
from tests.crash.moments import states
from tests.oracle import assert_clean, assert_same_disk, qemu_img, qemu_io, qemu_read, read_header
from tests.program import TOOL, qcow2_tool, qcow2_tool_ok

MIB = 1 << 20


def image(path: Path, size: int = 10 * MIB, **options: object) -> Path:
    given = ",".join(f"{name}={value}" for name, value in options.items())
    qemu_img("create", "-q", "-f", "qcow2", *(["-o", given] if given else []), path, str(size))
    return path


@pytest.mark.sample(6)
@pytest.mark.parametrize("size", [MIB, MIB - 3072, MIB + 512, 512, 0])
@pytest.mark.parametrize("options", [{}, {"cluster_size": 512}, {"compat": "0.10"}, {"lazy_refcounts": "on"}], ids=str)
def test_the_rest_is_as_it_was_and_the_end_does_not_come_back(
    tmp_path: Path, options: dict[str, object], size: int
) -> None:
    path = image(tmp_path / "a", 3 * MIB, **options)
    qemu_io(path, "write -c -P 9 0 64k", "write -P 7 64k 1984k", "write -z 960k 16k", "write -P 8 2M 1M")
    before = qemu_read(path)
    with qcow2.open(path, "r+") as disk:
        disk.resize(size, shrink=True)
    assert_clean(path)
    assert_same_disk(path, before[:size])
    assert path.stat().st_size < size + (600 << 10)
    qemu_img("resize", "-q", "-f", "qcow2", path, "4M")  # by whom does not know what we do when we grow
    assert_same_disk(path, before[:size].ljust(4 * MIB, b"\0"))


@pytest.mark.parametrize("again", [MIB - 3072, MIB // 2], ids=["the same size", "less"])
@pytest.mark.parametrize(
    "options",
    [{}, {"cluster_size": 512}, {"compat": "0.10"}, {"lazy_refcounts": "on"}, {"extended_l2": "on"}],
    ids=str,
)
def test_who_shrinks_again_finishes_what_was_interrupted(
    tmp_path: Path, options: dict[str, object], again: int
) -> None:
    path = image(tmp_path / "a", 3 * MIB, **options)
    qemu_io(path, "write -c -P 9 0 64k", "write -P 7 64k 3008k")
    before = qemu_read(path)
    patch_size(path, MIB - 3072)  # a death after the first write of a shrink
    host = path.stat().st_size
    assert qcow2_tool_ok("resize", "--shrink", path, str(again)) == "Image resized.\n"
    assert_clean(path)
    assert_same_disk(path, before[:again])
    assert path.stat().st_size < host - MIB
    qemu_img("resize", "-q", "-f", "qcow2", path, "3M")
    assert_same_disk(path, before[:again].ljust(3 * MIB, b"\0"))


def left_past_end(path: Path) -> str:
    """The line about *path*, a disk of one MiB."""
    what = "something is mapped past its end, as a shrink that was interrupted leaves it"
    return f"qcow2: {path}: {what}: qcow2 resize --shrink {path} {MIB} takes it away\n"


@pytest.mark.parametrize("nbytes", [-1, -511, -512, -MIB])
@pytest.mark.parametrize("image_format", ["qcow2", "raw", "luks"])
def test_no_disk_gets_a_negative_size(tmp_path: Path, image_format: str, nbytes: int) -> None:
    for size in (MIB, 0):
        path = tmp_path / f"{size}"
        key = {"key": b"k"} if image_format == "luks" else {}
        qcow2.create(path, size, format=image_format, iter_time=10, **key)  # type: ignore[arg-type]
        with qcow2.open(path, "r+", format=image_format, **key) as disk:  # type: ignore[arg-type]
            for shrink in (True, False):
                with pytest.raises(ValueError, match=f"size {nbytes}"):
                    disk.resize(nbytes, shrink=shrink)
            assert disk.size == size


@pytest.mark.parametrize("options", [{}, {"cluster_size": 512}, {"compat": "0.10"}, {"extended_l2": "on"}], ids=str)
def test_who_looks_is_told_of_a_shrink_that_was_interrupted(tmp_path: Path, options: dict[str, object]) -> None:
    path = image(tmp_path / "a", 3 * MIB, **options)
    qemu_io(path, f"write {MIB} 64k" if options else f"write -c {MIB} 64k")
    assert complaints(path) == ["", ""]
    patch_size(path, MIB)
    assert complaints(path) == [left_past_end(path)] * 2
    qcow2_tool_ok("resize", "--shrink", path, str(MIB))
    assert complaints(path) == ["", ""]


def test_what_a_shrink_left_is_told_of_each_image_of_a_chain(tmp_path: Path) -> None:
    base = image(tmp_path / "base", 3 * MIB)
    qemu_io(base, f"write {MIB} 64k")
    path = image(tmp_path / "a", MIB, backing_file=base, backing_fmt="qcow2")
    patch_size(base, MIB)
    assert qcow2_tool("info", "--backing-chain", path).stderr == left_past_end(base)
    assert qcow2_tool("info", path).stderr == ""


def test_zeros_past_the_end_are_nothing_to_tell(tmp_path: Path) -> None:
    path = image(tmp_path / "a", 3 * MIB)
    qemu_io(path, f"write -z {MIB} 1M")
    patch_size(path, MIB)
    assert complaints(path) == ["", ""]


def test_the_state_of_a_machine_is_past_the_end_by_right(tmp_path: Path) -> None:
    path = image(tmp_path / "a", 3 * MIB, cluster_size=512)
    qemu_io(path, f"write {MIB} 64k")
    qemu_img("snapshot", "-c", "one", path)
    patch_size(path, MIB)
    assert complaints(path) == [left_past_end(path)] * 2
    content = bytearray(path.read_bytes())
    (table,) = struct.unpack_from(">Q", content, 64)
    struct.pack_into(">Q", content, table + 40, 64 << 10)  # so many bytes, as savevm says
    path.write_bytes(content)
    assert complaints(path) == ["", ""]


def complaints(path: Path) -> list[str]:
    """What info and check say besides."""
    done = [qcow2_tool(command, path) for command in ("info", "check")]
    assert [each.returncode for each in done] == [0, 0]
    return [each.stderr for each in done]


def patch_size(path: Path, size: int) -> None:
    """Let the header, and nothing else, say that the disk is so long."""
    with path.open("r+b") as file:
        file.seek(24)
        file.write(struct.pack(">Q", size))


def blocks(content: bytes) -> list[int]:
    """Where the refcount blocks of an image with clusters of 512 bytes lie."""
    table, nclusters = struct.unpack_from(">QI", content, 48)
    return [block for block in struct.unpack_from(f">{nclusters * 64}Q", content, table) if block]


@pytest.mark.parametrize("draw", range(6))
def test_no_refcount_block_is_left_that_counts_nothing(tmp_path: Path, draw: int) -> None:
    path = image(tmp_path / "a", 3 * MIB, cluster_size=512, refcount_bits=64)
    places = list(range(0, 3 * MIB, 256 << 10))
    random.Random(draw).shuffle(places)
    for place in places[: len(places) - draw]:
        qemu_io(path, f"write -P 255 {place} 256k")
    before = qemu_read(path)
    qcow2_tool_ok("resize", "--shrink", path, "1M")
    assert_clean(path)
    assert_same_disk(path, before[:MIB])
    content = path.read_bytes()
    assert all(any(content[block : block + 512]) for block in blocks(content))
    assert len(content) < 3 * MIB  # what lies at its end counts clusters that are there
    with qcow2.open(path, writable=True) as disk:
        disk.resize(3 * MIB)
        disk.write(MIB, b"n" * 2 * MIB)
    assert_clean(path)
    assert_same_disk(path, before[:MIB] + b"n" * 2 * MIB)


@pytest.mark.parametrize("words", [("-9M",), ("1M",)])
def test_nothing_is_cut_off_unless_it_is_said(tmp_path: Path, words: tuple[str, ...]) -> None:
    path = image(tmp_path / "a")
    done = qcow2_tool("resize", path, *words)
    assert done.returncode == 1
    said = done.stderr.splitlines()
    assert said[0].endswith("Use the --shrink option to perform a shrink operation.")
    assert "warning: Shrinking an image will delete all data" in said[1]
    qcow2_tool_ok("resize", "--shrink", path, *words)
    assert read_header(path).fields["size"] == MIB


def test_over_a_backing_file_and_with_a_snapshot(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(random.Random(1).randbytes(3 * MIB))
    path = image(tmp_path / "a", 2 * MIB, backing_file="base", backing_fmt="raw")
    qemu_io(path, "write -P 7 900k 200k")
    before = qemu_read(path)
    qemu_img("snapshot", "-c", "one", path)
    qcow2_tool_ok("resize", "--shrink", path, str(MIB + 512))
    assert_clean(path)
    assert_same_disk(path, before[: MIB + 512])
    assert qemu_read(path, snapshot="one")[:MIB] == before[:MIB]
    qcow2_tool_ok("snapshot", "-a", "one", path)
    assert_same_disk(path, before)
    assert_clean(path)


def test_raw_shrinks_too(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\1" * MIB)
    qcow2_tool_ok("resize", "-f", "raw", "--shrink", tmp_path / "a", "-1000k")
    assert (tmp_path / "a").read_bytes() == b"\1" * (24 << 10)


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("has_backing", [False, True])
def test_what_is_new_is_preallocated(tmp_path: Path, mode: str, has_backing: bool) -> None:
    (tmp_path / "base").write_bytes(b"b" * 3 * MIB)
    options = {"backing_file": "base", "backing_fmt": "raw"} if has_backing else {}
    path = image(tmp_path / "a", MIB + 512, **options)
    before = qemu_read(path)
    qcow2_tool_ok("resize", f"--preallocation={mode}", path, "+4M")
    assert_clean(path)
    assert_same_disk(path, before.ljust(5 * MIB + 512, b"\0"))
    host = path.stat().st_size
    qemu_io(path, f"write -P 1 {MIB + 65536} {3 * MIB}")
    assert path.stat().st_size == host  # every cluster had its place
    if mode == "full":
        assert path.stat().st_blocks * 512 >= 4 * MIB
    done = qcow2_tool("resize", "--shrink", f"--preallocation={mode}", path, "1M")
    assert (done.returncode, done.stderr) == (1, "qcow2: Preallocation can only be used for growing images\n")


def may_mount() -> bool:
    return os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


FULL_HOST = """
mount -t tmpfs -o size=5m none "$1" && cp "$2"/* "$1" || exit 9
"$3" resize -f "$4" --preallocation="$5" "$1/a" 32M
status=$?
cp "$1"/* "$2"
exit $status
"""  # mount point, where the files are, tool, format, mode


def resize_on_full_host(there: Path, files: Path, image_format: str, mode: str) -> str:
    """Have that fail -> what it says."""
    words = ["unshare", "-m", "sh", "-c", FULL_HOST, "sh", there, files, TOOL, image_format, mode]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1
    return done.stderr


needs_mounts = pytest.mark.skipif(not may_mount(), reason="mounts take root and a namespace")


@needs_mounts
@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("qcow2", "falloc"),
        ("qcow2", "full"),
        ("bitmap", "full"),
        ("raw", "falloc"),
        ("raw", "full"),
        ("data", "falloc"),
        ("data", "full"),
    ],
)
def test_a_host_without_space_for_what_is_new_leaves_the_size(tmp_path: Path, kind: str, mode: str) -> None:
    (there := tmp_path / "there").mkdir()
    (files := tmp_path / "files").mkdir()
    full = "disk.raw" if kind == "data" else "a"
    path, image_format = files / "a", "raw" if kind == "raw" else "qcow2"
    qcow2.create(path, 3 * MIB, format=image_format, data_file="disk.raw" if kind == "data" else None)
    content = random.Random(kind).randbytes(3 * MIB)
    with qcow2.open(path, "r+", format=image_format) as disk:
        disk.write(0, content)
        if kind == "bitmap":
            disk.bitmaps.add("b")
    assert resize_on_full_host(there, files, image_format, mode) == f"qcow2: {there / full}: No space left on device\n"
    with qcow2.open(path, format=image_format) as disk:
        assert (disk.size, disk.read(0, disk.size)) == (3 * MIB, content)
        assert kind == "bitmap" or path.stat().st_size <= 4 * MIB
        if image_format == "qcow2":
            assert "No errors" in qcow2_tool_ok("check", path)
        if kind == "bitmap":
            assert list(disk.bitmaps.dirty("b")) == []


@needs_mounts
@pytest.mark.parametrize("mode", ["falloc", "full"])
@pytest.mark.parametrize(
    ("has_data_file", "length"), [(False, 1000), (True, 1_500_000)], ids=["within a sector", "past the disk"]
)
def test_a_host_without_space_leaves_the_length_of_the_file(
    tmp_path: Path, mode: str, has_data_file: bool, length: int
) -> None:
    (there := tmp_path / "there").mkdir()
    (files := tmp_path / "files").mkdir()
    file = files / ("disk.raw" if has_data_file else "a")
    if has_data_file:
        qcow2.create(files / "a", MIB, data_file=file.name, data_file_raw=True)
    content = random.Random(mode).randbytes(min(length, MIB))
    file.write_bytes(content.ljust(length, b"\0"))
    said = resize_on_full_host(there, files, "qcow2" if has_data_file else "raw", mode)
    assert said == f"qcow2: {there / file.name}: No space left on device\n"
    assert file.read_bytes() == content.ljust(length, b"\0")


@pytest.mark.parametrize("kind", ["small", "small-lazy", "width-64", "compressed", "snapshot", "v2", "v2-backing"])
@pytest.mark.parametrize("keeps", [0.9, 0.5, 0.0])
def test_every_moment_leaves_the_old_disk_or_the_new_one(kind: str, keeps: float) -> None:
    begun = start(kind)
    file = begun.image.copy()
    nsectors = int(KINDS[kind].nsectors * keeps)
    initial, driver = file.copy(), CrashDriver(7)
    disk = driver.run(open_image(file, begun.backing))
    driver.run(disk.shrink(nsectors * 512))
    driver.run(disk.close())
    seen = {look(state, kind) for state in states(driver, initial, file, 3, samples=3)}
    assert seen <= {begun.contents, begun.contents[: nsectors * 512]}
    assert len(seen) == 2


def test_every_moment_without_refcount_blocks_leaves_the_old_disk_or_the_new_one() -> None:
    begun = start("width-64")  # a block counts 64 clusters
    file = begun.image.copy()
    before = begun.contents.ljust(256 << 9, b"n")
    setup = CrashDriver(7)
    disk = setup.run(open_image(file, begun.backing))
    setup.run(disk.grow(256 << 9))
    setup.run(disk.write(len(begun.contents), MemoryBuffer(before[len(begun.contents) :])))
    setup.run(disk.close())
    initial, driver = file.copy(), CrashDriver(7)
    disk = driver.run(open_image(file, begun.backing))
    driver.run(disk.shrink(20 << 9))
    driver.run(disk.close())
    assert len(blocks(file.read(0, file.size))) < len(blocks(initial.read(0, initial.size))) - 1
    seen = {look(state, "width-64") for state in states(driver, initial, file, 3, samples=3)}
    assert seen == {before, before[: 20 << 9]}


def look(file: SimulatedFile, kind: str) -> bytes:
    driver = CrashDriver()
    disk = driver.run(open_image(file, start(kind).backing))
    driver.run(check_image(file))
    content = driver.run(read_all(disk))
    driver.run(disk.close())
    driver.run(check_image(file))
    return content


def test_the_moments_object_to_a_size_that_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    async def later(self: Root, nbytes: int) -> None:
        """Not yet."""

    monkeypatch.setattr(Root, "set_size", later)
    with pytest.raises(AssertionError):
        test_every_moment_leaves_the_old_disk_or_the_new_one("small", 0.5)


def test_a_disk_in_use_by_this_program_shrinks_under_it(tmp_path: Path) -> None:
    path = image(tmp_path / "a", 3 * MIB)
    with qcow2.open(path, writable=True) as disk:
        disk.write(MIB, b"x" * MIB)
        disk.resize(MIB + 100, shrink=True)
        assert disk.size == MIB + 512
        assert disk.read(MIB, 512) == b"x" * 512
        disk.resize(2 * MIB)
        assert disk.read(MIB + 512, 512) == bytes(512)
        disk.write(2 * MIB - 512, b"y" * 512)
    assert_clean(path)
