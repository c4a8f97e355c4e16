"""The blocking driver keeps what the operations promise, on real files."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from qcow2.driver import operation as op
from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.file import HostFile, run

pytestmark = pytest.mark.file


async def _do(operation):
    return await operation


def test_pieces_are_written_one_after_the_other(tmp_path: Path) -> None:
    with HostFile.open(str(tmp_path / "a"), create=True) as file:
        run(_do(op.Write(file, 3, b"ab", memoryview(b"cd"), MemoryBuffer(memoryview(b"ef")))))
    assert (tmp_path / "a").read_bytes() == b"\0\0\0abcdef"


def test_many_pieces_exceed_one_system_call(tmp_path: Path) -> None:
    with HostFile.open(str(tmp_path / "a"), create=True) as file:
        run(_do(op.Write(file, 0, *(bytes([i % 251]) for i in range(3000)))))
    assert (tmp_path / "a").read_bytes() == bytes(i % 251 for i in range(3000))


def test_what_lies_past_the_end_reads_as_zeros(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"xy")
    target = bytearray(b"?" * 4)
    with HostFile.open(str(tmp_path / "a")) as file:
        assert run(_do(op.Read(file, 1, 3))) == b"y\0\0"
        run(_do(op.ReadInto(file, 0, MemoryBuffer(memoryview(target)))))
    assert target == b"xy\0\0"


def test_reads_leave_the_time_of_last_access_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"xy")
    os.utime(tmp_path / "a", (1, os.stat(tmp_path / "a").st_mtime))  # older than the content: a read would renew it
    with HostFile.open(str(tmp_path / "a")) as file:
        assert run(_do(op.Read(file, 0, 2))) == b"xy"
    assert os.stat(tmp_path / "a").st_atime == 1


def test_what_is_empty_is_not_emptied_again(tmp_path: Path) -> None:
    """Ext4 takes it for the end of what was there, and writes the new content out at close."""
    (tmp_path / "a").touch()
    os.utime(tmp_path / "a", (1, 1))  # which the system call renews, whatever the length was
    with HostFile.open(str(tmp_path / "a"), writable=True) as file:
        run(_do(op.Resize(file, 0)))
        assert os.stat(tmp_path / "a").st_mtime == 1
        run(_do(op.Resize(file, 5000)))
        assert os.stat(tmp_path / "a").st_mtime > 1
        run(_do(op.Resize(file, 0)))
    assert os.stat(tmp_path / "a").st_size == 0


def test_what_is_empty_gives_back_the_space_behind_it(tmp_path: Path) -> None:
    with HostFile.open(str(tmp_path / "a"), create=True) as file:
        if subprocess.run(["fallocate", "--keep-size", "--length", "1M", file.path]).returncode:
            pytest.skip("the file system sets no space aside")
        assert (file.size(), os.fstat(file.fd).st_blocks) == (0, 2048)
        file.set_length(0)
        assert os.fstat(file.fd).st_blocks == 0


def test_zero_leaves_the_length_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 10000)
    with HostFile.open(str(tmp_path / "a"), writable=True) as file:
        run(_do(op.Zero(file, 5000, 100000)))
        assert run(_do(op.Size(file))) == 10000
    assert (tmp_path / "a").read_bytes() == b"x" * 5000 + bytes(5000)


def test_a_failure_arrives_at_the_await(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")

    async def try_to_write(file: HostFile) -> int:
        try:
            await op.Write(file, 0, b"y")
        except OSError as error:
            return error.errno or 0
        return 0

    with HostFile.open(str(tmp_path / "a")) as file:
        assert run(try_to_write(file)) == errno.EBADF


def test_a_directory_is_refused_by_name(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match=str(tmp_path)):
        HostFile.open(str(tmp_path))
    assert os.listdir("/proc/self/fd") == before


def test_a_failure_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    with HostFile.open(str(tmp_path / "a")) as file:
        for operation in (op.Write(file, 0, b"y"), op.Resize(file, 2)):
            with pytest.raises(OSError) as raised:
                run(_do(operation))
            assert raised.value.filename == file.path


def test_place_beyond_any_file_is_an_error_of_the_host(tmp_path: Path) -> None:
    async def read() -> bytes:
        return await op.Read(file, 1 << 63, 8)

    with HostFile.open(str(tmp_path / "f"), create=True) as file:
        with pytest.raises(OSError, match="no file reaches as far") as caught:
            run(read())
        assert caught.value.filename == file.path
