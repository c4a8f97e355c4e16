"""`ctl export`: a frozen point in time of a disk over NBD, while the guest writes on."""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import qcow2
import vhost
from tests import slowdisk
from tests.frontend import FrontEnd
from tests.load import Load
from tests.nbdclient import Client
from tests.oracle import assert_clean, qemu_img, qemu_io
from tests.program import DAEMON, TIMEOUT, Daemon, run
from tests.slowdisk import SlowDisk
from vhost.exports import ExportRefused, Exports

MIB = 1 << 20
SIZE = 16 * MIB
BLOCK = 4096


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qcow2.create(path, SIZE)
    return path


def start(image: Path, *options: str) -> Daemon:
    return Daemon(image, f"--control={image}.control", *options)


def ctl(image: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return run(DAEMON, "ctl", f"--control={image}.control", *words)


def ctl_ok(image: Path, *words: str | Path) -> Any:
    done = ctl(image, *words)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout) if done.stdout else None


def end(daemon: Daemon) -> str:
    daemon.process.send_signal(signal.SIGTERM)
    _, said = daemon.process.communicate(timeout=TIMEOUT)
    assert daemon.process.returncode == 0
    return said


def test_what_was_frozen_is_pulled_while_the_guest_writes(image: Path, tmp_path: Path) -> None:
    qemu_img("bitmap", "--add", image, "b0")
    path = tmp_path / "monday.sock"
    with start(image) as daemon, FrontEnd(daemon.socket_path) as guest:
        load = Load(guest, SIZE // BLOCK, zeroes=True)
        load.run(200)
        load.drain()
        then = load.expected()
        ctl_ok(image, "snapshot", "monday.qcow2")
        told = ctl_ok(image, "export", "start", "monday.qcow2", "--socket", path, "--bitmap", "b0")
        assert told == {"export": "monday.qcow2", "uri": f"nbd+unix:///?socket={path}", "running": True}
        assert ctl_ok(image, "export", "list") == [told]
        load.run(100)
        qemu_img("convert", "-O", "raw", told["uri"], tmp_path / "copy")
        load.run(100)
        load.drain()
        assert (tmp_path / "copy").read_bytes() == then
        with Client(path, contexts=("qemu:dirty-bitmap:b0",)) as client:
            assert client.flags & 2
            assert client.read(0, SIZE) == then
            dirty = client.status(0, SIZE)["qemu:dirty-bitmap:b0"]
            assert any(flags for _, flags in dirty)
        assert ctl_ok(image, "export", "stop", "monday.qcow2") is None
        assert not path.exists()
        assert ctl_ok(image, "export", "list") == []
        assert "Traceback" not in end(daemon)
    with qcow2.open(image) as disk:
        assert disk.read(0, SIZE) == load.expected()
    assert_clean(image)


def test_what_changed_since_the_last_snapshot_is_all_that_is_pulled(image: Path, tmp_path: Path) -> None:
    path, context = tmp_path / "sock", "qemu:allocation-depth"
    backup, moments, pulled = bytearray(SIZE), [], []
    with start(image) as daemon, FrontEnd(daemon.socket_path) as guest:
        load = Load(guest, SIZE // BLOCK, zeroes=True)
        for name, nrequests in (("monday", 150), ("tuesday", 20)):
            load.run(nrequests)
            load.drain()
            moments.append(load.expected())
            with vhost.Control(f"{image}.control") as control:
                control.snapshot(name)
                export = control.export_start(name, socket=path)
                assert control.exports() == [export]
                assert (export.file, export.uri, export.is_running) == (name, f"nbd+unix:///?socket={path}", True)
            with Client(path, contexts=(context,)) as client:
                offset = 0
                for nbytes, depth in client.status(0, SIZE)[context]:
                    if depth == 1:
                        backup[offset : offset + nbytes] = client.read(offset, nbytes)
                        pulled.append((name, nbytes))
                    offset += nbytes
            with vhost.Control(f"{image}.control") as control:
                control.export_stop(name)
            assert backup == moments[-1]
        end(daemon)
    assert sum(nbytes for name, nbytes in pulled if name == "tuesday") < SIZE // 2


def test_no_export_outlives_the_daemon(image: Path, tmp_path: Path) -> None:
    qemu_io(image, "write -P 7 0 64k")
    for number, how in enumerate((signal.SIGTERM, signal.SIGKILL)):
        path = tmp_path / f"{number}.sock"
        with start(image) as daemon, FrontEnd(daemon.socket_path):
            ctl_ok(image, "snapshot", f"{number}.qcow2")
            ctl_ok(image, "export", "start", f"{number}.qcow2", "--socket", path)
            with Client(path) as client:
                assert client.read(0, 1) == b"\7"
                daemon.process.send_signal(how)
                daemon.process.wait(TIMEOUT)
                assert client.is_dropped()


def test_an_export_that_dies_is_told_of(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with start(image) as daemon, FrontEnd(daemon.socket_path), vhost.Control(f"{image}.control") as control:
        control.subscribe("error")
        for name in ("one.qcow2", "two.qcow2"):
            control.snapshot(name)
            control.export_start(name, socket=path)
            if name == "one.qcow2":
                control.export_stop(name)  # as it was told to
        process = int(subprocess.check_output(["pgrep", "-P", str(daemon.process.pid)]))
        os.kill(process, signal.SIGKILL)
        event = control.next_event(TIMEOUT)
        assert event is not None
        assert event.data == {"message": "export of two.qcow2: has ended by itself, killed by signal 9"}
        assert [export.is_running for export in control.exports()] == [False]
        daemon.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.mark.parametrize("room", range(7))
def test_an_export_that_finds_no_descriptor_takes_none_along(image: Path, tmp_path: Path, room: int) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir("/proc/self/fd")}
    limit = [fd for fd in range(max(used) + 20) if fd not in used][room]
    with Exports(str(image), None) as exports:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
        try:
            with pytest.raises(ExportRefused, match="Too many open files"):
                exports.start(str(image), socket=str(tmp_path / "socket"))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert {int(name) for name in os.listdir("/proc/self/fd")} == used


def test_what_cannot_be_exported(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with start(image) as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(0, b"x" * 512)
        for words, said in [
            (("start", "none.qcow2", "--socket", path), "none.qcow2: No such file"),
            (("start", image.name, "--socket", path), "disk.qcow2"),  # which is written to
            (("stop", "none.qcow2"), "none.qcow2 is not exported"),
            (("start", "none.qcow2", "--port", "70000"), "70000 is not a port"),
            (("start", "none.qcow2"), "one of the arguments --socket --port is required"),
        ]:
            done = ctl(image, "export", *words)
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done
            assert said in done.stderr
        guest.write(0, b"y" * 512)
        assert guest.read(0, 512) == b"y" * 512
        ctl_ok(image, "snapshot", "one.qcow2")
        ctl_ok(image, "export", "start", "one.qcow2", "--socket", path)
        again = ctl(image, "export", "start", "one.qcow2", "--socket", tmp_path / "other")
        assert "one.qcow2 is exported already" in again.stderr
        ctl_ok(image, "export", "stop", "one.qcow2")
        place = ("one.qcow2", "--port", str(free_port()), "--bind", "0.0.0.0")
        in_plain = ctl(image, "export", "start", *place)
        assert in_plain.stderr.count("\n") == 1
        assert "0.0.0.0" in in_plain.stderr
        assert "give --tls-creds, or --no-tls" in in_plain.stderr
        assert ctl_ok(image, "export", "start", *place, "--no-tls")["uri"].startswith("nbd://0.0.0.0:")
        ctl_ok(image, "export", "stop", "one.qcow2")
        with vhost.Control(f"{image}.control") as control:
            assert control.export_start("one.qcow2", port=free_port(), address="0.0.0.0", no_tls=True).is_running
        end(daemon)


def test_path_that_depends_on_who_sees_it_is_refused(image: Path, tmp_path: Path) -> None:
    qcow2.create(tmp_path / "frozen", SIZE)
    with start(image) as daemon, FrontEnd(daemon.socket_path), vhost.Control(f"{image}.control") as control:
        for place in ({"socket": "sock"}, {"socket": str(tmp_path / "sock"), "certificates": "pki"}):
            with pytest.raises(vhost.ControlError, match="is not absolute"):
                control.ask("export-start", file="frozen", **place)
        assert control.exports() == []
        daemon.stop()
    assert not Path("sock").exists()


def test_an_export_that_hangs_as_it_begins_is_refused(image: Path, tmp_path: Path) -> None:
    backing, mount_point = tmp_path / "backing", tmp_path / "slow"
    backing.mkdir()
    mount_point.mkdir()
    qcow2.create(backing / "frozen", SIZE)
    with SlowDisk(backing, mount_point) as disk, Exports(str(image), None, patience=5) as exports:
        with disk.holding(slowdisk.OPEN), ThreadPoolExecutor(1) as pool:
            started = pool.submit(exports.start, str(mount_point / "frozen"), str(tmp_path / "sock"))
            disk.wait_for_one()
            with pytest.raises(ExportRefused, match="not begun within 5 s"):
                started.result(TIMEOUT)
        assert exports.list() == []
        for thread in threading.enumerate():
            if thread.name == "export":  # it ends with the process, which did not die while OPEN was held
                thread.join(TIMEOUT)


def test_the_uri_leads_to_a_socket_of_any_name(image: Path, tmp_path: Path) -> None:
    qcow2.create(tmp_path / "other.qcow2", SIZE)
    with start(image) as daemon, FrontEnd(daemon.socket_path):
        uri = ctl_ok(image, "export", "start", "other.qcow2", "--socket", tmp_path / "a#b c%41&d=é+")["uri"]
        assert json.loads(qemu_img("info", "--output=json", uri).stdout)["virtual-size"] == SIZE
        end(daemon)


def test_a_policy_holds_for_exports_too(image: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    qcow2.create(elsewhere / "base.qcow2", SIZE)
    qcow2.create(tmp_path / "other.qcow2", backing=elsewhere / "base.qcow2")
    (tmp_path / "images").mkdir()
    with start(image, f"--allow-files={tmp_path / 'images'}") as daemon, FrontEnd(daemon.socket_path):
        done = ctl(image, "export", "start", "other.qcow2", "--socket", tmp_path / "sock")
        assert "is not allowed" in done.stderr
        end(daemon)


def test_a_sandboxed_daemon_starts_no_program(image: Path, tmp_path: Path) -> None:
    with start(image, "--sandbox") as daemon, FrontEnd(daemon.socket_path):
        done = ctl(image, "export", "start", "one.qcow2", "--socket", tmp_path / "sock")
        assert "--sandbox starts no other program" in done.stderr
        end(daemon)


@pytest.mark.skipif(shutil.which("nbdcopy") is None, reason="no libnbd-bin here")
def test_nbdcopy_pulls_an_export(image: Path, tmp_path: Path) -> None:
    qemu_io(image, "write -P 7 1M 3M")
    with qcow2.open(image) as disk:
        then = disk.read(0, SIZE)
    copy = tmp_path / "copy"
    copy.touch()
    with start(image) as daemon, FrontEnd(daemon.socket_path):
        ctl_ok(image, "snapshot", "one.qcow2")
        told = ctl_ok(image, "export", "start", "one.qcow2", "--socket", tmp_path / "sock")
        subprocess.run(["nbdcopy", told["uri"], copy], check=True, timeout=TIMEOUT)
        end(daemon)
    assert copy.read_bytes() == then
    assert os.path.exists(tmp_path / "one.qcow2")
