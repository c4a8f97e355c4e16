"""The dirty bit: set before the first allocation, never cleared by a flush, cleared by a clean close or by repair."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import qcow2
from tests.builder import Recipe, build
from tests.builder.record import LAZY_REFCOUNTS
from tests.frontend import FrontEnd
from tests.oracle import assert_clean, assert_same_disk, qemu_check, qemu_img, read_header, sha256
from tests.patience import TIMEOUT
from tests.program import Daemon, qcow2_tool, qcow2_tool_ok

SIZE = 16 << 20
ALLOCATE_AND_DIE = """
import os, signal, sys, qcow2
disk = qcow2.open(sys.argv[1], writable=True)
for index in range(20):
    disk.write(index * 200_000 // 512 * 512, b"\\x5a" * 4096)
disk.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""
EXPECTED_AFTER_DEATH = bytearray(SIZE)
for _index in range(20):
    _start = _index * 200_000 // 512 * 512
    EXPECTED_AFTER_DEATH[_start : _start + 4096] = b"\x5a" * 4096


def lazy_image(directory: Path, *, version: int = 3, recorded: bool = True) -> Path:
    recipe = Recipe(size=SIZE, version=version, compatible=LAZY_REFCOUNTS if recorded else 0)
    return build(recipe, directory / "a").path


@pytest.fixture(params=["library", "daemon"])
def crashed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A lazy image whose writer was killed after it had allocated and flushed."""
    path = lazy_image(tmp_path)
    if request.param == "library":
        done = subprocess.run([sys.executable, "-c", ALLOCATE_AND_DIE, path], timeout=TIMEOUT, capture_output=True)
        assert done.returncode == -9, done.stderr
        return path
    with Daemon(path) as daemon, FrontEnd(daemon.socket_path) as guest:
        for index in range(20):
            guest.write(index * 200_000 // 512 * 512, b"\x5a" * 4096)
        guest.flush()
        daemon.kill()
    return path


def test_a_crash_leaves_the_dirty_bit_which_info_tells(crashed: Path) -> None:
    assert "cleanly shut down: no" in qcow2_tool_ok("info", crashed)
    assert json.loads(qcow2_tool_ok("info", "--output=json", crashed))["dirty-flag"] is True


def test_a_crash_leaves_refcounts_that_qemu_finds_wrong(crashed: Path) -> None:
    code, report = qemu_check(crashed)
    assert code == 2
    assert report["corruptions"] > 0


def test_a_read_only_open_of_a_crashed_image_changes_no_byte(crashed: Path) -> None:
    before = sha256(crashed)
    with qcow2.open(str(crashed)) as disk:
        assert disk.read(0, SIZE) == EXPECTED_AFTER_DEATH
    assert sha256(crashed) == before


def test_a_read_only_daemon_on_a_crashed_image_changes_no_byte(crashed: Path) -> None:
    before = sha256(crashed)
    with Daemon(crashed, "--read-only") as daemon, FrontEnd(daemon.socket_path) as guest:
        assert guest.read(0, 4096) == b"\x5a" * 4096
        daemon.stop()
    assert sha256(crashed) == before


def test_a_writable_open_repairs(crashed: Path) -> None:
    with qcow2.open(str(crashed), writable=True):
        pass
    assert not read_header(crashed).is_dirty
    assert_clean(crashed)
    assert_same_disk(crashed, bytes(EXPECTED_AFTER_DEATH))


def test_a_writable_daemon_repairs(crashed: Path) -> None:
    with Daemon(crashed) as daemon, FrontEnd(daemon.socket_path) as guest:
        assert guest.read(0, 4096) == b"\x5a" * 4096
        daemon.stop()
    assert not read_header(crashed).is_dirty
    assert_clean(crashed)


def test_check_repairs(crashed: Path) -> None:
    assert qcow2_tool("check", crashed).returncode == 2
    assert qcow2_tool("check", "-r", "all", crashed).returncode == 0
    assert not read_header(crashed).is_dirty
    assert_clean(crashed)
    assert_same_disk(crashed, bytes(EXPECTED_AFTER_DEATH))


def test_an_image_that_qemu_left_dirty_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "a"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, str(SIZE))
    commands = ["-c", "write -P 7 0 1M", "-c", "flush", "-c", "sigraise 9"]
    subprocess.run(["qemu-io", "-f", "qcow2", *commands, path], capture_output=True, timeout=TIMEOUT)
    assert read_header(path).is_dirty
    with qcow2.open(str(path), writable=True) as disk:
        assert disk.read(0, 1 << 20) == b"\7" * (1 << 20)
    assert not read_header(path).is_dirty
    assert_clean(path)


def test_a_clean_run_of_the_daemon_leaves_the_bit_clear(tmp_path: Path) -> None:
    path = lazy_image(tmp_path)
    with Daemon(path) as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(0, b"x" * 100_352)
        guest.flush()
        daemon.stop()
    assert not read_header(path).is_dirty
    assert_clean(path)


def test_a_clean_run_of_the_library_leaves_the_bit_clear(tmp_path: Path) -> None:
    path = lazy_image(tmp_path)
    with qcow2.open(str(path), writable=True) as disk:
        disk.write(0, b"x" * 100_000)
    assert not read_header(path).is_dirty
    assert_clean(path)


def test_flush_never_clears_the_bit(tmp_path: Path) -> None:
    path = lazy_image(tmp_path)
    with qcow2.open(str(path), writable=True) as disk:
        disk.write(0, b"x" * 100_000)
        disk.flush()
        assert read_header(path).is_dirty
        disk.flush()
        assert read_header(path).is_dirty


def test_a_flush_of_the_guest_never_clears_the_bit(tmp_path: Path) -> None:
    path = lazy_image(tmp_path)
    with Daemon(path) as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(0, b"x" * 4096)
        guest.flush()
        assert read_header(path).is_dirty


def test_the_bit_is_set_only_by_an_allocation(tmp_path: Path) -> None:
    path = lazy_image(tmp_path)
    with qcow2.open(str(path), writable=True) as disk:
        disk.write(0, b"x" * 4096)
    with qcow2.open(str(path), writable=True) as disk:
        disk.read(0, SIZE)
        disk.write(0, b"y" * 4096)
        disk.flush()
        assert not read_header(path).is_dirty
        disk.write(1 << 20, b"y")
        assert read_header(path).is_dirty


@pytest.mark.parametrize("recorded", [True, False])
def test_the_override_wins_over_the_image(tmp_path: Path, recorded: bool) -> None:
    path = lazy_image(tmp_path, recorded=recorded)
    with qcow2.open(str(path), writable=True, lazy_refcounts=not recorded) as disk:
        disk.write(0, b"x" * 4096)
        assert read_header(path).is_dirty == (not recorded)
    assert not read_header(path).is_dirty
    assert_clean(path)


def test_the_daemon_overrides_too(tmp_path: Path) -> None:
    path = lazy_image(tmp_path)
    with Daemon(path, "--lazy-refcounts=off") as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(0, b"x" * 4096)
        assert not read_header(path).is_dirty
        daemon.kill()
    code, _ = qemu_check(path)
    assert code in (0, 3)


def test_version_2_cannot_be_lazy(tmp_path: Path) -> None:
    path = lazy_image(tmp_path, version=2)
    with pytest.raises(qcow2.UnsupportedImage, match="lazy"):
        qcow2.open(str(path), writable=True, lazy_refcounts=True)


def test_a_second_crash_during_use_after_repair_is_seen_again(crashed: Path) -> None:
    with Daemon(crashed) as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(8 << 20, b"again" + bytes(507))
        daemon.kill()
    assert read_header(crashed).is_dirty
    with qcow2.open(str(crashed), writable=True) as disk:
        assert disk.read(8 << 20, 5) == b"again"
    assert_clean(crashed)
