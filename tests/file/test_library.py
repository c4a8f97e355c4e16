"""The synchronous face: images from ordinary Python, on real files."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import qcow2
from tests.oracle import assert_clean, assert_same_disk, qemu_img, qemu_io
from tests.patience import TIMEOUT

SIZE = 10 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, str(SIZE))
    return image


def test_what_is_written_is_read_back_by_us_and_by_qemu(path: Path) -> None:
    with qcow2.open(str(path), writable=True) as disk:
        assert disk.size == SIZE
        disk.write(1234567, b"hello")
        disk.flush()
        assert disk.read(1234565, 9) == b"\0\0hello\0\0"
    assert_clean(path)
    assert_same_disk(path, bytes(1234567) + b"hello" + bytes(SIZE - 1234572))


def test_every_kind_of_bytes_can_be_written(path: Path) -> None:
    with qcow2.open(str(path), writable=True) as disk:
        disk.write(0, bytearray(b"ab"))
        disk.write(2, memoryview(b"xcdx")[1:3])
        disk.write(4, b"")
        assert disk.read(0, 5) == b"abcd\0"


def test_what_is_not_inside_the_disk_is_refused(path: Path) -> None:
    with qcow2.open(str(path), writable=True) as disk:
        for offset, nbytes in [(SIZE, 1), (SIZE - 1, 2), (-1, 1), (0, -1), (0, SIZE + 1)]:
            with pytest.raises(ValueError, match=f"the disk of {SIZE} bytes"):
                disk.read(offset, nbytes)
            with pytest.raises(ValueError, match=f"the disk of {SIZE} bytes"):
                disk.discard(offset, nbytes)
        with pytest.raises(ValueError, match=f"the disk of {SIZE} bytes"):
            disk.write(SIZE - 1, b"ab")


def test_a_read_only_disk_refuses_writes(path: Path) -> None:
    before = path.read_bytes()
    with qcow2.open(str(path)) as disk, pytest.raises(OSError, match="read-only"):
        disk.write(0, b"x")
    assert path.read_bytes() == before


def test_a_closed_disk_refuses_everything(path: Path) -> None:
    disk = qcow2.open(str(path))
    disk.close()
    disk.close()
    with pytest.raises(ValueError, match="closed"):
        disk.read(0, 1)


def test_every_file_of_the_chain_is_closed(path: Path, tmp_path: Path) -> None:
    top = tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", path.name, "-F", "qcow2", top)
    before = os.listdir("/proc/self/fd")
    with qcow2.open(str(top)) as disk:
        assert len(disk.files) == 2
    path.unlink()
    with pytest.raises(FileNotFoundError):
        qcow2.open(str(top))
    assert os.listdir("/proc/self/fd") == before


def test_a_raw_file_is_a_disk_too(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(b"\1" * 1000)
    with qcow2.open(str(raw), writable=True, format="raw") as disk:
        assert disk.size == 1024
        assert disk.read(990, 34) == b"\1" * 10 + bytes(24)
        disk.write(512, b"\2")
        disk.write_zeroes(0, 512)
    assert raw.read_bytes()[:1000] == bytes(512) + b"\2" + b"\1" * 487


def test_extents_are_those_of_qemu(path: Path, tmp_path: Path) -> None:
    draw = random.Random(3)
    top = tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", path.name, "-F", "qcow2", top, str(2 * SIZE))
    for image in (path, top):
        verbs = draw.choices(["write -P 1", "write -z", "discard"], k=30)
        commands = [f"{verb} {draw.randrange(76) << 17} {draw.randrange(1, 9) << 16}" for verb in verbs]
        qemu_io(image, *commands, options=("-d", "unmap"))
    with qcow2.open(str(top)) as disk:
        ours = [described(extent) for extent in disk.extents(0, disk.size)]
    assert ours == json.loads(qemu_img("map", "--output=json", top).stdout)


def described(extent: "qcow2.node.extent.Extent") -> dict[str, object]:
    """An extent in the words of qemu-img map."""
    words: dict[str, object] = {
        "start": extent.guest_offset,
        "length": extent.nbytes,
        "depth": extent.depth,
        "present": extent.is_present,
        "zero": extent.is_zero,
        "data": extent.is_data,
    }
    return words if extent.host_offset is None else {**words, "offset": extent.host_offset}


def test_discarded_space_returns_to_the_host(path: Path) -> None:
    with qcow2.open(str(path), writable=True) as disk:
        disk.write(0, os.urandom(SIZE))
        disk.flush()
        full = path.stat().st_blocks
        disk.discard(0, SIZE)
        disk.flush()
        assert path.stat().st_blocks < full // 4
        assert disk.read(0, SIZE) == bytes(SIZE)
    assert_clean(path)


def test_a_small_write_leaves_a_small_file(path: Path) -> None:
    before = path.stat().st_size
    with qcow2.open(str(path), writable=True) as disk:
        disk.write(0, b"x")
    assert path.stat().st_size <= before + 3 * 65536


def test_a_small_cache_serves_a_large_disk(tmp_path: Path) -> None:
    image = tmp_path / "large.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", image, "40G")
    places = [index * (37 << 20) + 4096 for index in range(1000)]
    with qcow2.open(str(image), writable=True, cache_size=1) as disk:
        for number, place in enumerate(places):
            disk.write(place, number.to_bytes(4, "big"))
        assert [int.from_bytes(disk.read(place, 4), "big") for place in places] == list(range(1000))
        assert disk.image.statistics.l2_loads >= 1000  # none of the tables, each read again, has stayed
    assert_clean(image)


def test_program_that_closes_no_disk_ends(path: Path) -> None:
    program = "import sys, qcow2; disk = qcow2.open(sys.argv[1], writable=True); disk.write(0, b'x'); disk.flush()"
    subprocess.run([sys.executable, "-c", program, path], check=True, timeout=TIMEOUT)
    with qcow2.open(str(path), writable=True) as disk:
        assert disk.read(0, 1) == b"x"


@pytest.mark.parametrize("nbytes", [0, 1, 2, 511, 70_000])
def test_what_is_read_is_an_object_of_its_own(tmp_path: Path, nbytes: int) -> None:
    path = tmp_path / "disk"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    with qcow2.open(path, writable=True) as disk:
        disk.write(65_000, b"\xa7" * 80_000)
        read = disk.read(65_000, nbytes)
        disk.write(65_000, b"x" * 80_000)
        assert (read, hash(read)) == (b"\xa7" * nbytes, hash(b"\xa7" * nbytes))
    assert (bytes(1), bytes(2), b"") == (b"\0", b"\0\0", bytes(0))


def test_a_directory_is_not_taken_for_its_letters(tmp_path: Path) -> None:
    """Among which is the root: every file would be allowed."""
    qcow2.create(tmp_path / "disk", 1 << 20)
    with pytest.raises(TypeError, match="allow_files is a list of directories, not '/tmp'"):
        qcow2.open(tmp_path / "disk", allow_files="/tmp")
