"""`--existing` to a block device: a mirror overwrites what lay there, and leaves or serves it; so does a backup."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import qcow2
from tests.border.test_storage import loop_device, partitioned_device
from tests.file.test_jobs import BLOCK, MIB, SHOWN, SIZE, chain, content, control, start, top
from tests.file.test_mirror import get_ready, until
from tests.frontend import FrontEnd
from tests.load import Load
from tests.oracle import assert_clean
from tests.patience import TIMEOUT
from tests.program import Daemon, qcow2_tool_ok
from vhost import Control, ControlError

__all__ = ["chain", "top"]  # fixtures
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="loop devices need root")


@contextmanager
def noisy_device(path: Path, nbytes: int, *options: str) -> Iterator[Path]:
    """A device that holds noise, so that what is left out is seen."""
    path.write_bytes(os.urandom(nbytes))
    with loop_device(path, *options) as device:
        yield device


def serve_copy(client: Control, job: int, load: Load) -> None:
    """The guest goes on meanwhile."""
    get_ready(client, job, load)
    client.complete(job)
    while not client.job(job).has_ended:
        load.run(10)
    assert client.job(job).state == "completed", client.job(job)
    load.drain()


def assert_serves(image: Path, expected: bytes, *options: str) -> None:
    """The command line of before finds what is on the device, and writes there."""
    with start(image, *options) as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(BLOCK, b"w" * BLOCK)
        assert guest.read(0, 2 * BLOCK) == expected[:BLOCK] + b"w" * BLOCK
        daemon.stop()


@pytest.mark.parametrize(("sector", "mode"), [("512", "--cache=writeback"), ("4096", "--cache=none")])
def test_a_raw_disk_moves_to_a_device(tmp_path: Path, sector: str, mode: str) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(SHOWN)
    with noisy_device(tmp_path / "lun", SIZE, f"--sector-size={sector}") as device:
        with start(disk, "--format=raw", mode) as daemon, FrontEnd(daemon.socket_path) as guest:
            load = Load(guest, SIZE // BLOCK, zeroes=True, base=SHOWN)
            with control(disk) as client:
                serve_copy(client, client.mirror(str(device), existing=True).job, load)
            daemon.stop()
        assert disk.samefile(device)
        assert device.read_bytes() == load.expected()
        assert_serves(disk, load.expected(), "--format=raw", mode)


def test_a_device_is_left_as_a_copy_of_that_moment(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(SHOWN)
    with noisy_device(tmp_path / "lun", SIZE) as device:
        with start(disk, "--format=raw") as daemon, FrontEnd(daemon.socket_path) as guest, control(disk) as client:
            load = Load(guest, SIZE // BLOCK, zeroes=True, base=SHOWN)
            job = client.mirror(str(device), existing=True).job
            get_ready(client, job, load)
            load.drain()
            client.cancel(job)
            client.wait(job)
            guest.write(0, b"later" * 512)
            daemon.stop()
        assert device.read_bytes() == load.expected()


@pytest.mark.parametrize("mode", ["--cache=writeback", "--cache=none"])
def test_a_qcow2_disk_moves_to_a_device(top: Path, tmp_path: Path, mode: str) -> None:
    with noisy_device(tmp_path / "lun", 2 * SIZE) as device:
        qcow2_tool_ok("create", device, str(SIZE))
        with start(top, mode) as daemon, FrontEnd(daemon.socket_path) as guest, control(top) as client:
            load = Load(guest, SIZE // BLOCK, zeroes=True, base=SHOWN)
            serve_copy(client, client.mirror(str(device), existing=True).job, load)
            daemon.stop()
        assert top.samefile(device)
        assert content(top) == load.expected()
        assert_clean(device)
        assert_serves(top, load.expected(), mode)


def test_a_device_of_another_length_is_refused(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(SHOWN)
    with noisy_device(tmp_path / "lun", SIZE + MIB) as device:
        before = device.read_bytes()
        with start(disk, "--format=raw") as daemon, FrontEnd(daemon.socket_path), control(disk) as client:
            with pytest.raises(ControlError, match=f"is {SIZE + MIB} bytes long, the disk is {SIZE}"):
                client.mirror(str(device), existing=True)
            daemon.stop()
        assert device.read_bytes() == before


def test_what_a_device_held_does_not_show_where_the_disk_has_grown(tmp_path: Path) -> None:
    disk, lun = tmp_path / "disk", tmp_path / "lun"
    disk.write_bytes(SHOWN)
    with noisy_device(lun, SIZE) as device:
        with start(disk, "--format=raw") as daemon, FrontEnd(daemon.socket_path), control(disk) as client:
            job = client.mirror(str(device), existing=True).job
            assert client.wait(job).state == "ready"
            with lun.open("ab") as file:
                file.write(os.urandom(MIB))
            subprocess.run(["losetup", "--set-capacity", device], check=True, timeout=TIMEOUT)
            client.resize(SIZE + MIB)
            until(client, job, "ready")
            assert client.wait(client.complete(job).job).state == "completed"
            daemon.stop()
        assert device.read_bytes() == SHOWN + bytes(MIB)


def test_a_disk_that_outgrows_the_device_loses_the_copy_alone(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(SHOWN)
    with noisy_device(tmp_path / "lun", SIZE) as device:
        with start(disk, "--format=raw") as daemon, FrontEnd(daemon.socket_path) as guest, control(disk) as client:
            job = client.mirror(str(device), existing=True).job
            assert client.wait(job).state == "ready"
            client.resize(SIZE + MIB)
            guest.write(SIZE, b"w" * BLOCK)
            ended = client.wait(job)
            assert (ended.state, ended.error) == ("failed", f"{device}: No space left on device")
            daemon.stop()
        assert disk.read_bytes() == SHOWN + b"w" * BLOCK + bytes(MIB - BLOCK)


def test_a_device_that_holds_an_increment_is_freed_as_the_refusal_says(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    qcow2.create(disk, SIZE)
    with qcow2.open(disk, "r+") as new:
        new.bitmaps.add("nightly")
    with noisy_device(tmp_path / "lun", SIZE + 8 * MIB) as device, start(disk) as daemon:
        with FrontEnd(daemon.socket_path) as guest, control(disk) as client:
            for fill in (b"1", b"2"):
                guest.write(0, fill * BLOCK)
                job = client.backup(str(device), existing=True, bitmap="nightly").job
                assert client.wait(job).state == "completed"
                with pytest.raises(ControlError, match=r"clear its start \(blkdiscard -z -l 64KiB\) or name another"):
                    client.backup(str(device), existing=True, bitmap="nightly")
                assert content(device)[:BLOCK] == fill * BLOCK
                subprocess.run(["blkdiscard", "-z", "-l", "64KiB", device], check=True, timeout=TIMEOUT)
        daemon.stop()


def assert_known_as_source(client: Control, target: Path) -> None:
    refused = pytest.raises(ControlError, match=f"^{target}: is a file of the disk that is served$")
    with refused:
        client.mirror(str(target), "raw", existing=True)
    with refused:
        client.backup(str(target), format="raw", existing=True)


def test_a_device_over_a_file_of_the_disk_is_no_target(top: Path) -> None:
    files = {path: path.read_bytes() for path in top.parent.iterdir()}
    with ExitStack() as stack:
        devices = [stack.enter_context(loop_device(path)) for path in files]
        devices.append(stack.enter_context(loop_device(top, "--offset=65536", "--sizelimit=65536")))
        with start(top) as daemon, FrontEnd(daemon.socket_path), control(top) as client:
            for device in devices:
                assert_known_as_source(client, device)
            client.snapshot("frozen")
            for device in devices:
                assert_known_as_source(client, device)
            daemon.stop()
    top.with_name("frozen").rename(top)
    assert {path: path.read_bytes() for path in files} == files


def test_a_device_under_the_backup_before_takes_no_increment(tmp_path: Path) -> None:
    disk, full, lowest = (tmp_path / name for name in ("disk", "full", "lowest"))
    qcow2.create(disk, SIZE)
    with qcow2.open(disk, "r+") as new:
        new.bitmaps.add("nightly")
    lowest.write_bytes(SHOWN)
    qcow2.create(full, backing=lowest, backing_format="raw")
    with loop_device(lowest) as device, start(disk) as daemon, FrontEnd(daemon.socket_path), control(disk) as client:
        with pytest.raises(ControlError, match=f"^{device}: is a file of the backup before, which this one is over$"):
            client.backup(str(device), existing=True, bitmap="nightly", backing=str(full))
        daemon.stop()
    assert lowest.read_bytes() == SHOWN


def test_a_part_of_a_disk_that_is_served_is_no_target(tmp_path: Path) -> None:
    with partitioned_device(tmp_path / "backing") as (device, partition):
        before, at = device.read_bytes(), tmp_path / "control"
        with Daemon(device, "--format=raw", f"--control={at}") as daemon, FrontEnd(daemon.socket_path):
            with Control(at) as client:
                for target in (partition, tmp_path / "backing"):
                    assert_known_as_source(client, target)
            daemon.stop()
        assert device.read_bytes() == before
