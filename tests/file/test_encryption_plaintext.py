"""Whatever the library, the tool or a daemon that aborts does with an encrypted disk: no plaintext in any file."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qcow2
from qcow2 import UnsupportedImage
from tests.file.test_encryption_daemon import KEY, LUKS, PATTERN, SIZE, holds_pattern
from tests.frontend import FrontEnd
from tests.program import TIMEOUT, Daemon, qcow2_tool, qcow2_tool_ok

MIB = 1 << 20
TEXT = (PATTERN * (4 * MIB // len(PATTERN) + 1))[: 4 * MIB]


@pytest.fixture
def logs() -> Iterator[Path]:
    """On a file system in memory, where the link log and the live bits of bitmaps are kept."""
    path = Path(f"/dev/shm/test-plaintext-{os.getpid()}")
    path.mkdir()
    yield path
    for each in path.rglob("*"):
        each.unlink()
    path.rmdir()


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "key").write_bytes(KEY)
    return ["--object", f"secret,id=s0,file={tmp_path / 'key'}"]


def require_none(*places: Path) -> None:
    """Raises: AssertionError if a file beneath one of *places* holds what was written."""
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    assert [path.name for path in files if holds_pattern(path)] == []


def make(path: Path, words: list[str], *more: str, options: str = "") -> Path:
    qcow2_tool_ok("create", "-q", *words, "-o", LUKS + options, *more, path, str(SIZE))
    return path


def work(disk: qcow2.Disk) -> None:
    """Fresh clusters, parts of them and of sectors, copies, overwrites, zeros, discards, a disk that grows."""
    disk.write(0, TEXT[: 2 * MIB])
    disk.write(3 * MIB + 512, TEXT[:512])
    disk.write(3 * MIB + (1 << 17) + 77, TEXT[:1000])
    disk.write(5 * MIB - 100, TEXT[: 1 << 17])
    disk.write(MIB, TEXT[:4096])
    disk.write_zeroes(MIB + 700, 3000, unmap=False)
    disk.discard(MIB + (1 << 16), 1 << 17)
    disk.write(MIB + (1 << 16) + 512, TEXT[:512])
    with pytest.raises(UnsupportedImage):
        disk.write_compressed(0, TEXT[: 1 << 16])


@pytest.mark.parametrize("options", ["", ",extended_l2=on", ",lazy_refcounts=on", ",compat=0.10"])
def test_nothing_is_in_plain_after_any_operation_of_the_library(
    tmp_path: Path, words: list[str], logs: Path, options: str
) -> None:
    base = make(tmp_path / "base", words, options=options)
    with qcow2.open(base, key=KEY, writable=True) as disk:
        disk.write(4 * MIB, TEXT)
    top = make(tmp_path / "top", words, "-b", str(base), "-F", "qcow2", options=options)
    disk = qcow2.open(top, key=KEY, writable=True, log_directory=str(logs))
    if "0.10" not in options:
        disk.bitmaps.add("b0")
    work(disk)
    require_none(tmp_path, logs)
    disk.create_snapshot("then")
    work(disk)
    disk.write(7 * MIB, TEXT[:70_000])
    disk.abandon()  # a death: links wait
    require_none(tmp_path, logs)
    with qcow2.open(top, key=KEY, writable=True, log_directory=str(logs)) as disk:
        disk.apply_snapshot("then")
        work(disk)
        disk.delete_snapshot("then")
        disk.resize(SIZE + 3 * MIB)
        disk.write(SIZE - 4096, TEXT[:MIB])
        disk.resize(SIZE - 5000 // 512 * 512, shrink=True)
        disk.resize(SIZE)
    require_none(tmp_path, logs)


def test_nothing_is_in_plain_after_jobs_over_encrypted_images(tmp_path: Path, words: list[str]) -> None:
    base, other = make(tmp_path / "base", words), make(tmp_path / "other", words)
    top = make(tmp_path / "top", words, "-b", str(base), "-F", "qcow2")
    for path in (base, top):
        with qcow2.open(path, key=KEY, writable=True) as disk:
            work(disk)
    copy = tmp_path / "copy"
    qcow2_tool_ok("convert", *words, "-O", "qcow2", "-o", LUKS, top, copy)
    qcow2_tool_ok("convert", *words, "-O", "luks", "-o", "key-secret=s0,iter-time=10", top, tmp_path / "raw")
    assert qcow2_tool("convert", "-c", *words, "-O", "qcow2", "-o", LUKS, top, tmp_path / "packed").returncode == 1
    qcow2_tool_ok("rebase", *words, "-b", other, "-F", "qcow2", top)
    require_none(tmp_path)
    qcow2_tool_ok("commit", *words, top)
    require_none(tmp_path)
    with qcow2.open(other, key=KEY) as disk, qcow2.open(copy, key=KEY) as same:
        assert disk.read(0, SIZE) == same.read(0, SIZE)


def dumps_core() -> None:
    """For a child: let it leave a core dump, where it is."""
    resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def leaves_cores(directory: Path) -> bool:
    """Whether a process that aborts leaves its memory in *directory* on this host."""
    abort = [sys.executable, "-c", "import os; os.abort()"]
    subprocess.run(abort, cwd=directory, preexec_fn=dumps_core, check=False)
    found = [*directory.glob("core*")]
    for path in found:
        path.unlink()
    return bool(found)


def test_a_daemon_that_aborts_leaves_nothing_in_plain(
    tmp_path: Path, words: list[str], logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        has_cores = leaves_cores(tmp_path)
    except subprocess.SubprocessError:
        has_cores = False
    if not has_cores:
        pytest.skip("no core dumps in the working directory here")
    image = make(tmp_path / "disk", words)
    monkeypatch.chdir(tmp_path)
    shell = ["sh", "-c", 'ulimit -c unlimited; exec "$@"', "sh"]
    options = (f"--key-file={tmp_path / 'key'}", f"--link-log={logs}", "--cache-size=1M")
    with Daemon(image, *options, under=shell) as daemon, FrontEnd(daemon.socket_path) as front_end:
        for offset in range(0, MIB, 1 << 17):
            front_end.write(offset, TEXT[: 1 << 17])
        for offset in range(0, MIB, 1 << 17):
            front_end.submit(1, offset, TEXT[: 1 << 16])
        daemon.process.send_signal(signal.SIGABRT)
        daemon.process.wait(TIMEOUT)
    assert daemon.process.returncode == -signal.SIGABRT
    assert [*tmp_path.glob("core*")] == []
    require_none(tmp_path, logs)
