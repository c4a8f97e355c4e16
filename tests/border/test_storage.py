"""Each door on storage that is full, or has sectors of 4096 bytes: nothing acknowledged is lost, and life goes on."""

import errno
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import qcow2
from tests.frontend import FLUSH, IOERR, OK, OUT, FrontEnd
from tests.oracle import assert_not_corrupt, backing_name
from tests.program import TIMEOUT, Daemon, qcow2_tool, qcow2_tool_ok
from vhost import Control

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts and loop devices need root")
MIB = 1 << 20
LUKS = ("--object", "secret,id=key,data=123456", "-o", "key-secret=key,iter-time=10")


def _run(*words: str | Path) -> str:
    return subprocess.run([*map(str, words)], check=True, capture_output=True, text=True, timeout=TIMEOUT).stdout


@contextmanager
def mounted(*words: str | Path) -> Iterator[Path]:
    """``mount *words*``, the last of which is the directory."""
    _run("mount", *words)
    try:
        yield Path(words[-1])
    finally:
        _run("umount", words[-1])


@contextmanager
def loop_device(path: Path, *options: str) -> Iterator[Path]:
    try:
        device = _run("losetup", "--find", "--show", *options, path).strip()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no loop device: {error.stderr.strip()}")
    try:
        yield Path(device)
    finally:
        _run("losetup", "--detach", device)


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB with an overlay of 16 MiB in it."""
    (tmp_path / "base").write_bytes(b"b" * (16 * MIB))
    directory = tmp_path / "small"
    directory.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=3M", "none", directory):
        qcow2_tool_ok("create", "-b", tmp_path / "base", "-F", "raw", directory / "disk", "16M")
        yield directory


@pytest.mark.parametrize("cache", ["writeback", "writethrough"])
def test_full_disk_fails_requests_and_the_daemon_lives(full: Path, cache: str) -> None:
    """Then a file is removed, and what failed succeeds."""
    ballast = full / "ballast"
    ballast.write_bytes(b"x" * MIB)
    held: dict[int, bytes] = {}
    with Daemon(full / "disk", f"--cache={cache}", "--sandbox", f"--allow-files={full.parent}") as daemon:
        with FrontEnd(daemon.socket_path) as front_end:
            for turn in range(128):
                data = bytes([turn]) * 4096
                if front_end.do(OUT, turn * 131072, data).status == OK:
                    held[turn] = data
            assert 0 < len(held) < 128
            assert all(front_end.read(turn * 131072, 4096) == data for turn, data in held.items())
            ballast.unlink()
            assert front_end.do(FLUSH).status == OK
            lost = next(turn for turn in range(128) if turn not in held)
            assert front_end.do(OUT, lost * 131072, b"!" * 4096).status == OK
            held[lost] = b"!" * 4096
            front_end.flush()
        daemon.stop()
    with qcow2.open(str(full / "disk")) as disk:
        assert all(disk.read(turn * 131072, 4096) == data for turn, data in held.items())
    assert_not_corrupt(full / "disk")


def test_a_header_whose_page_is_gone_fails_a_request_and_the_daemon_lives(full: Path) -> None:
    """The log's mark is stored in a mapping of it: without space that is SIGBUS, and nothing is lost."""
    image, ballast = full / "disk", full / "ballast"
    with Daemon(image, "--cache=writeback") as daemon, FrontEnd(daemon.socket_path) as front_end:
        front_end.write(0, b"0" * 4096)
        with image.open("r+b") as file:
            header = file.read(4096)
            _run("fallocate", "--punch-hole", "--length", "4096", image)
            free = os.statvfs(full).f_bavail * os.statvfs(full).f_frsize
            ballast.write_bytes(b"x" * (free - 65536))  # room for the cluster, not for the mark
            assert front_end.do(OUT, 131072, b"1" * 4096).status == IOERR
            ballast.unlink()
            os.pwrite(file.fileno(), header, 0)
        front_end.write(262144, b"2" * 4096)
        front_end.flush()
        daemon.stop()
    with qcow2.open(str(image)) as disk:
        assert [disk.read(turn * 131072, 1) for turn in range(3)] == [b"0", b"b", b"2"]
    assert_not_corrupt(image)


def test_full_disk_kills_nothing_that_the_library_wrote(full: Path) -> None:
    held: list[int] = []
    with qcow2.open(str(full / "disk"), writable=True) as disk:
        failure = 0
        for turn in range(128):
            try:
                disk.write(turn * 131072, bytes([turn]) * 4096)
            except OSError as error:
                failure = error.errno or 0
                break
            held.append(turn)
        assert failure == errno.ENOSPC
        assert held
        assert all(disk.read(turn * 131072, 1)[0] == turn for turn in held)
    with qcow2.open(str(full / "disk")) as disk:
        assert all(disk.read(turn * 131072, 1)[0] == turn for turn in held)
    assert_not_corrupt(full / "disk")


def test_full_disk_fails_the_tool_in_a_line(full: Path) -> None:
    (full / "ballast").write_bytes(b"x" * (os.statvfs(full).f_bavail * os.statvfs(full).f_frsize))
    before = (full / "disk").read_bytes()
    for words in (
        ("create", "-o", "preallocation=full", full / "new", "16M"),
        ("create", full / "new", "16M"),
        ("resize", full / "disk", "100G"),
        ("check", "-r", "all", full / "disk"),
    ):
        done = qcow2_tool(*words)
        assert "Traceback" not in done.stderr
        assert done.returncode == 0 or done.stderr.count("\n") == 1, done.stderr
    assert not (full / "new").exists(), "a failed create leaves nothing"
    assert len(before) <= (full / "disk").stat().st_size
    assert_not_corrupt(full / "disk")


TOOL_ON_A_DEVICE = (
    ("resize", "DEVICE", "5M"),  # with a longer L1 table, if clusters are small
    ("snapshot", "-c", "one", "DEVICE"),
    ("snapshot", "-a", "one", "DEVICE"),
    ("snapshot", "-d", "one", "DEVICE"),
    ("rebase", "-u", "-b", "", "DEVICE"),
    ("check", "-r", "all", "DEVICE"),
    ("map", "DEVICE"),
    ("info", "DEVICE"),
)


@pytest.mark.parametrize("cluster_size", ["512", "4K", "64K"])
@pytest.mark.parametrize("cache", ["writeback", "none", "directsync"])
def test_sectors_of_4096_bytes(tmp_path: Path, cluster_size: str, cache: str) -> None:
    """The image is the device itself; requests are smaller than its sectors, and clusters may be."""
    backing = tmp_path / "backing"
    with backing.open("wb") as file:
        file.truncate(16 * MIB)
    with ExitStack() as stack:
        device = stack.enter_context(loop_device(backing, "--sector-size", "4096"))
        qcow2_tool_ok("create", "-o", f"cluster_size={cluster_size}", device, "4M")
        (tmp_path / "disk").symlink_to(device)  # the daemon's socket lies beside the name
        with Daemon(tmp_path / "disk", f"--cache={cache}") as daemon:
            with FrontEnd(daemon.socket_path) as front_end:
                for turn in range(16):
                    front_end.write(turn * 1536, bytes([turn]) * 1536)
                front_end.write_zeroes(512, 1024, unmap=False)
                front_end.flush()
                assert front_end.read(0, 512) == bytes(512)
                assert front_end.do(OUT, 1 << 40, b"x" * 512).status == IOERR
            daemon.stop()
        with qcow2.open(str(device), writable=True) as disk:
            assert disk.read(512, 1024) == bytes(1024)
            assert all(disk.read(turn * 1536, 1536) == bytes([turn]) * 1536 for turn in range(1, 16))
            disk.write(700, b"!" * 100)
            assert disk.read(699, 102) == b"\0" + b"!" * 100 + b"\0"
        assert_not_corrupt(device)
        for words in TOOL_ON_A_DEVICE if cache == "writeback" else ():
            qcow2_tool_ok(*(device if word == "DEVICE" else word for word in words))
        assert_not_corrupt(device)
        with qcow2.open(str(device)) as disk:
            assert disk.read(699, 102) == b"\0" + b"!" * 100 + b"\0"


@pytest.mark.parametrize("words", ["-O qcow2", "-O qcow2 -c", "-O qcow2 -S 0", "-O raw", "-n -O raw"])
def test_convert_to_a_device_full_of_old_bytes(tmp_path: Path, words: str) -> None:
    source, backing = tmp_path / "source", tmp_path / "device"
    content = bytes(100 << 10) + b"x" * MIB + bytes(3 * MIB) + b"y" * 5000
    source.write_bytes(content.ljust(8 * MIB, b"\0"))
    backing.write_bytes(os.urandom(16 * MIB))
    image_format = "raw" if "raw" in words else "qcow2"
    with loop_device(backing) as device:
        qcow2_tool_ok("convert", "-f", "raw", *words.split(), source, device)
        if image_format == "qcow2":
            assert_not_corrupt(device)
        with qcow2.open(device, format=image_format) as disk:
            assert disk.read(0, 8 * MIB) == source.read_bytes()


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_space_that_cannot_be_set_aside_is_missed_by_name(full: Path, image_format: str) -> None:
    new, old = full / "new", full / "old"
    done = qcow2_tool("create", "-q", "-f", image_format, "-o", "preallocation=falloc", new, "4M")
    assert (done.returncode, done.stderr) == (1, f"qcow2: {new}: No space left on device\n")
    qcow2_tool_ok("create", "-q", "-f", image_format, old, "64k")
    done = qcow2_tool("resize", "-f", image_format, "--preallocation=falloc", old, "4M")
    assert (done.returncode, done.stderr) == (1, f"qcow2: {old}: No space left on device\n")


def test_convert_to_a_full_file_system_leaves_nothing(full: Path, tmp_path: Path) -> None:
    before = sorted(full.iterdir())
    for words in ("-O qcow2", "-O raw", "-c -O qcow2 -S 0"):
        (tmp_path / "noise").write_bytes(os.urandom(4 * MIB))
        done = qcow2_tool("convert", "-f", "raw", *words.split(), tmp_path / "noise", full / "copy")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "No space left on device" in done.stderr
        assert sorted(full.iterdir()) == before


@pytest.mark.parametrize(
    "words", [("raw",), ("luks", *LUKS), ("qcow2", "-o", "preallocation=metadata")], ids=lambda words: words[0]
)
def test_a_device_that_is_too_short_keeps_what_it_has(tmp_path: Path, words: tuple[str, ...]) -> None:
    backing = tmp_path / "backing"
    backing.write_bytes(b"x" * (8 * MIB))
    with loop_device(backing) as device:
        done = qcow2_tool("create", "-f", *words, device, "8M" if words[0] == "luks" else "16M")
        assert done.returncode == 1
        assert "No space left on device" in done.stderr
        assert device.read_bytes() == b"x" * (8 * MIB)


def test_a_device_does_not_get_shorter(tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    backing.write_bytes(b"x" * (8 * MIB))
    with loop_device(backing) as device:
        done = qcow2_tool("resize", "-f", "raw", "--shrink", device, "1M")
        assert (done.returncode, done.stderr) == (1, "qcow2: Cannot resize device files\n")
        with (
            qcow2.open(str(device), format="raw", writable=True) as disk,
            pytest.raises(qcow2.UnsupportedImage, match="Cannot resize"),
        ):
            disk.resize(MIB, shrink=True)


@pytest.mark.parametrize("compress", [False, True])
def test_what_a_device_held_is_no_part_of_the_disk_that_is_copied_to_it(tmp_path: Path, compress: bool) -> None:
    """Half of each cluster is not zeros, and cannot be compressed."""
    backing, source = tmp_path / "backing", tmp_path / "source"
    backing.write_bytes(b"x" * (8 * MIB))
    source.write_bytes(b"".join(os.urandom(60 << 10) + bytes(4 << 10) for _ in range(32)) + b"end".ljust(4096))
    with loop_device(backing) as device:
        qcow2.convert(source, device, source_format="raw", compress=compress)
        with qcow2.open(str(device)) as disk:
            assert disk.read(0, disk.size) == source.read_bytes()


@pytest.mark.parametrize("source", ["device", "backing"])
def test_the_source_is_no_target_by_another_way(tmp_path: Path, source: str) -> None:
    """Another node of the device, and the loop device over the file, or the file under it."""
    backing = tmp_path / "backing"
    backing.write_bytes(b"b" * (4 * MIB))
    with loop_device(backing) as device:
        node = tmp_path / "node"
        os.mknod(node, device.stat().st_mode, device.stat().st_rdev)
        read = device if source == "device" else backing
        for target in (node, backing, device):
            done = qcow2_tool("convert", "-U", "-f", "raw", "-O", "raw", read, target)
            assert (done.returncode, done.stderr) == (1, f"qcow2: {target}: the target is the source, or under it\n")
    assert backing.read_bytes() == b"b" * (4 * MIB)


def test_parts_of_one_file_are_copied_to_each_other(tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    backing.write_bytes(b"a" * MIB + b"b" * (2 * MIB))
    half = ("--sizelimit", str(MIB))
    with (
        loop_device(backing, *half) as first,
        loop_device(backing, *half, "--offset", str(MIB)) as second,
        loop_device(backing, *half, "--offset", str(MIB + MIB // 2)) as crossing,
    ):
        assert qcow2_tool("convert", "-f", "raw", "-O", "raw", second, crossing).returncode == 1
        qcow2_tool_ok("convert", "-f", "raw", "-O", "raw", first, second)
    assert backing.read_bytes() == b"a" * (2 * MIB) + b"b" * MIB


@contextmanager
def partitioned_device(path: Path) -> Iterator[tuple[Path, Path]]:
    """A device of *path*, 4 MiB, and its one partition, from 1 MiB to 3 MiB."""
    start, nsectors = 2 * MIB // 1024, 4 * MIB // 1024
    entry = struct.pack("<B3sB3sII", 0, bytes(3), 0x83, bytes(3), start, nsectors)
    content = bytearray(4 * MIB)
    content[446 : 446 + len(entry)], content[510:512] = entry, b"\x55\xaa"
    path.write_bytes(content)
    with loop_device(path) as device:
        _run("partx", "--add", device)
        try:
            yield device, Path(f"{device}p1")
        finally:
            _run("partx", "--delete", device)


def test_a_partition_is_a_part_of_its_disk(tmp_path: Path) -> None:
    with partitioned_device(tmp_path / "backing") as (device, partition):
        before = device.read_bytes()
        for source, target in ((device, partition), (partition, device), (partition, tmp_path / "backing")):
            done = qcow2_tool("convert", "-U", "-f", "raw", "-O", "raw", source, target)
            assert (done.returncode, done.stderr) == (1, f"qcow2: {target}: the target is the source, or under it\n")
        with loop_device(tmp_path / "backing", "--sizelimit", str(MIB)) as front:
            qcow2_tool_ok("convert", "-n", "-f", "raw", "-O", "raw", front, partition)
        assert device.read_bytes() == before[:MIB] * 2 + before[2 * MIB :]


@pytest.mark.parametrize("is_whole", [True, False], ids=["disk", "partition"])
def test_a_sandboxed_daemon_streams_down_to_a_device(tmp_path: Path, *, is_whole: bool) -> None:
    top = tmp_path / "top"
    with partitioned_device(tmp_path / "backing") as (device, partition):
        base = device if is_whole else partition
        qcow2_tool_ok("create", "-b", base, "-F", "raw", tmp_path / "mid")
        qcow2_tool_ok("create", "-b", "mid", "-F", "qcow2", top)
        confined = ("--sandbox", f"--allow-files={tmp_path}", "--allow-files=/dev")
        with Daemon(top, f"--control={top}.control", *confined) as daemon, FrontEnd(daemon.socket_path):
            with Control(f"{top}.control") as client:
                ended = client.wait(client.stream(str(base)).job)
                assert (ended.state, ended.error) == ("completed", "")
            daemon.stop()
        assert backing_name(top) == str(base)


def test_a_loop_device_is_its_file_whatever_that_is_called_by_now(tmp_path: Path) -> None:
    backing, moved = tmp_path / "backing", tmp_path / "moved"
    backing.write_bytes(b"b" * MIB)
    with loop_device(backing) as device:
        moved.hardlink_to(backing)
        backing.unlink()
        backing.write_bytes(b"c" * MIB)
        done = qcow2_tool("convert", "-f", "raw", "-O", "raw", moved, device)
        assert (done.returncode, done.stderr) == (1, f"qcow2: {device}: the target is the source, or under it\n")
        assert moved.read_bytes() == b"b" * MIB
        qcow2_tool_ok("convert", "-f", "raw", "-O", "raw", backing, device)
