"""Windows of many stretches are copied and compared as one stretch after the other would be."""

import random
import resource
import subprocess
from pathlib import Path

import pytest

import qcow2
from qcow2.job.copy import MAX_STRETCHES, WINDOW
from qcow2.job.crew import WIDTH
from tests.oracle import assert_clean, qemu_img, qemu_read
from tests.program import TOOL, qcow2_tool, qcow2_tool_ok

pytestmark = pytest.mark.file
CLUSTER = 64 << 10
SIZE = 64 << 20


def scattered(path: Path, seed: int, size: int = SIZE) -> bytearray:
    """A sparse raw file of stretches from a sector to a few clusters, some of them zeros, with holes of all sizes."""
    draw = random.Random(seed)
    content = bytearray(size)
    with path.open("wb") as file:
        file.truncate(size)
        offset = 0
        while True:
            offset += draw.choice([4096, CLUSTER, 3 * CLUSTER, 12 * CLUSTER])
            nbytes = draw.randrange(1, 8) * draw.choice([512, 4096, CLUSTER])
            if offset + nbytes > size:
                return content
            piece = bytes(nbytes) if draw.random() < 0.2 else draw.randbytes(nbytes)
            file.seek(offset)
            file.write(piece)
            content[offset : offset + nbytes] = piece
            offset += nbytes


@pytest.mark.sample(6)
@pytest.mark.parametrize("order", [[], ["-W"]], ids=["in order", "-W"])
@pytest.mark.parametrize(
    "words",
    [
        ["-O", "raw"],
        ["-O", "qcow2"],
        ["-O", "qcow2", "-o", "cluster_size=512"],
        ["-O", "qcow2", "-o", "cluster_size=2M"],
        ["-O", "qcow2", "-S", "0"],
        ["-O", "qcow2", "-S", "16M"],
        ["-O", "qcow2", "-o", "compat=0.10"],
        ["-O", "qcow2", "-o", "extended_l2=on,refcount_bits=1"],
        ["-O", "qcow2", "-o", "preallocation=metadata"],
        ["-O", "qcow2", "-c"],
        ["-O", "qcow2", "-r", "1G"],
        ["-O", "raw", "-S", "512"],
    ],
    ids=" ".join,
)
def test_a_scattered_disk_is_copied(tmp_path: Path, words: list[str], order: list[str]) -> None:
    content = scattered(tmp_path / "source", 1)
    qcow2_tool_ok("convert", "-f", "raw", *words, *order, tmp_path / "source", tmp_path / "new")
    if words[1] == "raw":
        assert (tmp_path / "new").read_bytes() == content
        return
    assert_clean(tmp_path / "new")
    assert qemu_read(tmp_path / "new") == content
    qcow2_tool_ok("convert", "-f", "qcow2", "-O", "raw", *order, tmp_path / "new", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content


def test_more_stretches_than_a_window_has(tmp_path: Path) -> None:
    step, count = 4 * CLUSTER, 5 * MAX_STRETCHES + 3
    with (tmp_path / "source").open("wb") as file:
        for number in range(count):
            file.seek(number * step)
            file.write(random.Random(number).randbytes(512))
        file.truncate(count * step)
    qcow2_tool_ok("convert", "-f", "raw", "-O", "qcow2", tmp_path / "source", tmp_path / "new")
    assert qemu_read(tmp_path / "new") == (tmp_path / "source").read_bytes()


def test_the_later_comes_later_in_the_file(tmp_path: Path) -> None:
    scattered(tmp_path / "source", 2)
    qcow2_tool_ok("convert", "-f", "raw", "-O", "qcow2", tmp_path / "source", tmp_path / "new")
    with qcow2.open(tmp_path / "new") as disk:
        places = [extent.host_offset for extent in disk.extents() if extent.is_data and extent.host_offset is not None]
    assert len(places) > 30
    assert places == sorted(places)


@pytest.mark.parametrize("version", ["0.10", "1.1"])
def test_clusters_that_zeros_would_have_had_are_used_by_what_follows(tmp_path: Path, version: str) -> None:
    """Each window is half zeros that are written, above what a backing file shows and past its end."""
    draw = random.Random(8)
    content = b"".join(draw.choice([draw.randbytes, bytes])(CLUSTER) for _ in range(SIZE // CLUSTER))
    ndata = sum(1 for start in range(0, SIZE, CLUSTER) if any(content[start : start + CLUSTER]))
    (tmp_path / "source").write_bytes(content)
    (tmp_path / "base").write_bytes(b"\xff" * (SIZE // 2))
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", str(tmp_path / "top"), str(SIZE))
    with qcow2.open(tmp_path / "top", "r+") as disk:
        disk.write(0, content)
    words = ["-O", "qcow2", "-W", "-o", f"compat={version}"]
    qcow2_tool_ok("convert", "-f", "raw", *words, tmp_path / "source", tmp_path / "new")
    qcow2_tool_ok(
        "convert", "-f", "qcow2", *words, "-B", tmp_path / "base", "-F", "raw", tmp_path / "top", tmp_path / "over"
    )
    for name in ("new", "over"):
        assert_clean(tmp_path / name)
        assert qemu_read(tmp_path / name) == content
    under_way = WIDTH * WINDOW * 5 // 8  # windows, each about half zeros, at the end
    assert (tmp_path / "new").stat().st_size < ndata * CLUSTER + under_way + 16 * CLUSTER
    assert (tmp_path / "new").stat().st_blocks * 512 < (ndata + 16) * CLUSTER


@pytest.mark.parametrize("order", [[], ["-W"]], ids=["in order", "-W"])
def test_a_write_that_fails_says_where_on_the_disk(tmp_path: Path, order: list[str]) -> None:
    """The window has two stretches, and room is for the first one only."""
    with (tmp_path / "source").open("wb") as file:
        for offset in (0, 8 << 20):
            file.seek(offset)
            file.write(random.Random(offset).randbytes(1 << 20))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, ((1 << 20) + (512 << 10), resource.RLIM_INFINITY))

    for image_format in ("qcow2", "raw"):
        command = [TOOL, "convert", *order, "-f", "raw", "-O", image_format, tmp_path / "source", tmp_path / "new"]
        done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
        assert done.returncode == 1
        assert f"error while writing at byte {8 << 20}: File too large" in done.stderr
        assert not (tmp_path / "new").exists()


def test_stretches_in_several_files_are_no_window(tmp_path: Path) -> None:
    """Of two sources, one after the other, each window from file to file has its own."""
    contents = [scattered(tmp_path / f"source{seed}", seed, 8 << 20) for seed in (3, 4)]
    sources = [tmp_path / "source3", tmp_path / "source4"]
    for image_format in ("raw", "qcow2"):
        qcow2_tool_ok("convert", "-f", "raw", "-O", image_format, *sources, tmp_path / "new")
        read = qemu_read(tmp_path / "new") if image_format == "qcow2" else (tmp_path / "new").read_bytes()
        assert read == contents[0] + contents[1]


def test_chain_whose_parts_lie_in_two_files_is_copied_to_a_raw_file(tmp_path: Path) -> None:
    content = scattered(tmp_path / "base", 5, 16 << 20)
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", str(tmp_path / "top"))
    with qcow2.open(tmp_path / "top", "r+") as disk:
        for offset in range(0, 16 << 20, 1 << 20):
            disk.write(offset, b"top" * 1000)
            content[offset : offset + 3000] = b"top" * 1000
    qcow2_tool_ok("convert", "-f", "qcow2", "-O", "raw", tmp_path / "top", tmp_path / "new")
    assert (tmp_path / "new").read_bytes() == content


@pytest.mark.sample(1)
@pytest.mark.parametrize("formats", ["raw raw", "raw qcow2", "qcow2 qcow2"])
def test_the_first_difference_of_scattered_disks_is_found(tmp_path: Path, formats: str) -> None:
    content = scattered(tmp_path / "one", 6)
    data = [offset for offset in range(0, SIZE, 512) if any(content[offset : offset + 512])]
    kinds = formats.split()
    qemu_img("convert", "-f", "raw", "-O", kinds[0], str(tmp_path / "one"), str(tmp_path / "left"))
    command = ("compare", "-f", kinds[0], "-F", kinds[1], tmp_path / "left", tmp_path / "right")
    draw = random.Random(7)
    for count in (0, 1, 1, 1, 2, 5):
        changed = bytearray(content)
        places = sorted(draw.sample(data, count))
        for offset in places:
            changed[offset + 300] ^= 1
        (tmp_path / "changed").write_bytes(changed)
        qemu_img("convert", "-f", "raw", "-O", kinds[1], str(tmp_path / "changed"), str(tmp_path / "right"))
        done = qcow2_tool(*command)
        if places:
            assert (done.returncode, done.stdout) == (1, f"Content mismatch at offset {places[0]}!\n")
        else:
            assert (done.returncode, done.stdout) == (0, "Images are identical.\n")


@pytest.mark.parametrize("at", [0, 1 << 20, (3 << 20) + 4096, None])
def test_a_difference_in_the_last_stretch_or_the_second_file_is_found(tmp_path: Path, at: int | None) -> None:
    """No window of these is full; what comes from the overlay and from under it lies in two files."""
    content = bytearray(4 << 20)
    for number, name in enumerate(("base", "top")):
        qemu_img("create", "-q", "-f", "qcow2", *(["-b", "base", "-F", "qcow2"] * number), str(tmp_path / name), "4M")
        with qcow2.open(tmp_path / name, "r+") as disk:
            for offset in range(number << 20, 4 << 20, 2 << 20):
                content[offset : offset + 5000] = random.Random(offset).randbytes(5000)
                disk.write(offset, content[offset : offset + 5000])
    if at is not None:
        content[at] ^= 1
    (tmp_path / "raw").write_bytes(content)
    done = qcow2_tool("compare", "-f", "qcow2", "-F", "raw", tmp_path / "top", tmp_path / "raw")
    said = "Images are identical.\n" if at is None else f"Content mismatch at offset {at}!\n"
    assert (done.returncode, done.stdout) == (at is not None, said)
