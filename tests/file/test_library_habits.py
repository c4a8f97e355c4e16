"""What a picky Python program does with a disk, its files, and what they raise."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qcow2
from qcow2.error import MetadataOverlap, UnknownFeatures
from tests.patience import TIMEOUT

SIZE = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    image = tmp_path / "disk.qcow2"
    qcow2.create(image, SIZE)
    return image


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_disk_and_its_files_have_no_twin_that_closes_them(path: Path, duplicate: Callable[[Any], Any]) -> None:
    with qcow2.open(path, "r+") as disk:
        file = disk.file()
        for one in (disk, file):
            with pytest.raises(TypeError, match="can be neither copied nor pickled"):
                duplicate(one)
        disk.write(0, b"still open")
        assert file.read(10) == b"still open"


@pytest.mark.parametrize(
    "error",
    [
        qcow2.UnsupportedImage("a", "beyond us"),
        qcow2.CorruptImage("a", 512, "wrong"),
        qcow2.WrongKey("a", "no slot"),
        MetadataOverlap("a", 512, "wrong"),
        UnknownFeatures("a", ["shiny"], [3]),
    ],
)
def test_errors_come_whole_out_of_another_process(error: qcow2.ImageError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
    assert str(copy.copy(error)) == str(error)


def test_a_file_that_outlives_its_disk_can_be_closed(path: Path) -> None:
    with qcow2.open(path, "r+") as disk:
        file = disk.file()
        file.write(b"kept")
    with pytest.raises(ValueError, match="closed"):
        file.read(1)
    file.close()
    with pytest.raises(ValueError, match="closed"), disk:
        pass
    with qcow2.open(path) as disk:
        assert disk.read(0, 4) == b"kept"


def test_a_position_is_a_whole_number(path: Path) -> None:
    with qcow2.open(path) as disk, disk.file() as file:
        for position in (1.0, "1", None):
            with pytest.raises(TypeError):
                file.seek(position)  # type: ignore[arg-type]
        assert file.seek(SIZE + 5) == file.tell() == SIZE + 5
        assert file.read(1) == b""
        assert file.seek(-1, io.SEEK_END) == SIZE - 1


@pytest.mark.parametrize("image_format", ["qcow2", "raw", "luks"])
def test_a_range_is_of_whole_numbers(tmp_path: Path, image_format: str) -> None:
    key = b"key" if image_format == "luks" else None
    qcow2.create(tmp_path / "new", SIZE, format=image_format, key=key, iter_time=10)
    with qcow2.open(tmp_path / "new", "r+", format=image_format, key=key) as disk:
        for start, nbytes in ((0, 512.0), (0.0, 512), (0.0, 65536), (0.5, 0), (0, float("nan"))):
            for act in (disk.read, disk.write_zeroes, disk.discard, disk.extents):
                with pytest.raises(TypeError):
                    act(start, nbytes)  # type: ignore[operator]
            with pytest.raises(TypeError):
                disk.write(float(start), b"x" * 512)


@pytest.mark.parametrize("size", [1.5, "1M"])
def test_a_size_is_a_whole_number_and_nothing_is_made_of_another(tmp_path: Path, size: Any) -> None:
    with pytest.raises(TypeError):
        qcow2.create(tmp_path / "new", size)
    assert not (tmp_path / "new").exists()


def test_what_is_printed_names_the_image(path: Path) -> None:
    with qcow2.open(path, "r+") as disk, disk.file() as file:
        disk.bitmaps.add("changes")
        file.seek(512)
        assert path.name in repr(file)
        assert "at 512" in repr(file)
        assert "'changes'" in repr(disk.bitmaps)
        assert path.name in repr(next(disk.extents()).file or disk)


def test_a_listing_shows_what_is_for_others() -> None:
    assert {name for name in dir(qcow2) if not name.startswith("_")} == {*qcow2.__all__} - {"__version__"}


USED_AT_THE_END = {
    "a file": "f = disk.file(); f.write(b'x')",
    "a buffered file": "import io; f = io.BufferedWriter(disk.file()); f.write(b'x')",
    "a generator": "def use():\n with disk:\n  yield\nheld = use(); next(held)",
    "a finalizer": "class Held:\n def __del__(self, disk=disk):\n  disk.write(0, b'y'); disk.close()\nheld = Held()",
}


@pytest.mark.parametrize("program", USED_AT_THE_END.values(), ids=USED_AT_THE_END)
def test_an_interpreter_that_ends_waits_for_no_disk(path: Path, program: str) -> None:
    """No thread runs any more then: who asks for one would wait for ever."""
    opened = f"import qcow2; disk = qcow2.open({str(path)!r}, 'r+'); disk.write(0, b'x')"
    done = subprocess.run([sys.executable, "-c", f"{opened}\n{program}"], capture_output=True, timeout=TIMEOUT)
    assert done.returncode == 0
