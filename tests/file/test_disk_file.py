"""A disk as a file object, in the hands of the standard library."""

import errno
import io
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import qcow2
from tests.program import qcow2_tool_ok

SIZE = 3 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[qcow2.Disk]:
    path = tmp_path / "disk"
    qcow2_tool_ok("create", "-q", path, str(SIZE))
    with qcow2.open(path, writable=True) as opened:
        yield opened


def test_copies_go_both_ways(disk: qcow2.Disk) -> None:
    content = os.urandom(SIZE)
    shutil.copyfileobj(io.BytesIO(content), disk.file())
    target = io.BytesIO()
    with io.BufferedReader(disk.file()) as source:
        shutil.copyfileobj(source, target)
    assert target.getvalue() == content
    assert len(disk) == disk.size == SIZE


def test_an_archive_is_written_to_it_and_read_from_it(disk: qcow2.Disk, tmp_path: Path) -> None:
    (tmp_path / "note").write_bytes(b"in a tar file on a disk\n" * 1000)
    with io.BufferedRandom(disk.file()) as file, tarfile.open(fileobj=file, mode="w") as archive:
        archive.add(tmp_path / "note", "note")
    with disk.file() as file, tarfile.open(fileobj=file) as archive:
        member = archive.extractfile("note")
        assert member is not None
        assert member.read() == b"in a tar file on a disk\n" * 1000


def test_positions(disk: qcow2.Disk) -> None:
    with disk.file() as file:
        assert file.seek(-4, os.SEEK_END) == SIZE - 4
        assert file.write(b"end ") == 4
        with pytest.raises(OSError, match=f"ends at {SIZE}"):
            file.write(b"x")
        assert file.read(1) == b""
        assert file.seek(-2, os.SEEK_CUR) == file.tell() == SIZE - 2
        assert file.readall() == b"d "
        assert file.seek(SIZE + 10) == SIZE + 10
        assert file.read() == b""
        with pytest.raises(ValueError, match="-1"):
            file.seek(-1)
        with pytest.raises(io.UnsupportedOperation, match="cannot be truncated to 5"):
            file.truncate(5)
        assert file.truncate(SIZE) == SIZE
        assert (file.readable(), file.writable(), file.seekable(), file.mode) == (True, True, True, "rb+")
    assert disk.read(SIZE - 4, 4) == b"end "
    with pytest.raises(ValueError, match="closed"):
        file.tell()


def test_who_does_not_count_is_told_that_not_all_fits(disk: qcow2.Disk) -> None:
    with disk.file() as file:
        file.seek(100)
        with pytest.raises(OSError, match=f"ends at {SIZE}") as caught:
            shutil.copyfileobj(io.BytesIO(os.urandom(SIZE)), file)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, disk.files[0].path)


def test_of_what_does_not_fit_nothing_is_written(disk: qcow2.Disk) -> None:
    disk.write(SIZE - 4, b"mine")
    with disk.file() as file:
        for position in (SIZE - 4, SIZE, SIZE + 9):
            file.seek(position)
            with pytest.raises(OSError, match=f"ends at {SIZE}"):
                file.write(b"yours")
            assert (file.tell(), file.write(b"")) == (position, 0)
    assert disk.read(SIZE - 4, 4) == b"mine"


def test_a_buffer_is_filled_in_place(disk: qcow2.Disk) -> None:
    disk.write(512, b"abcdef")
    buffer = bytearray(8)
    disk.readinto(511, memoryview(buffer)[1:])
    assert buffer == b"\0\0abcdef"
    with pytest.raises(ValueError, match="not inside"):
        disk.readinto(SIZE - 1, buffer)


def test_a_read_only_disk_is_a_read_only_file(disk: qcow2.Disk) -> None:
    path = disk.files[0].path
    disk.close()
    with qcow2.open(path) as again, again.file() as file:
        assert (file.writable(), file.mode, file.name) == (False, "rb", path)
        with pytest.raises(io.UnsupportedOperation, match="read-only"):
            file.write(b"x")
        assert len(file.read()) == SIZE
