"""The units under a systemd that runs: process 1 of namespaces of its own, which knows no units but ours."""

import os
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.frontend import FrontEnd
from tests.oracle import assert_not_corrupt
from tests.program import DAEMON, TIMEOUT, qcow2_tool_ok

ROOT = Path(__file__).resolve().parents[2]
SYSTEMD = Path("/lib/systemd/systemd")
TARGETS = ("sysinit", "basic", "sockets", "shutdown")  # which every unit wants; empty here
UNITS = ("vhost-user-qcow2@disk.socket", "vhost-user-qcow2@disk.service")

# $1: a directory with copies of /etc (to be) and the units; what is mounted here ends with the namespace.
ENTER = """
mount --make-rprivate / && mount -t proc proc /proc && mount -t cgroup2 none /sys/fs/cgroup &&
mount -t tmpfs none /run && mount --bind "$1/etc" /etc || exit 1
exec env -i container=test PATH=/usr/bin:/bin NOTIFY_SOCKET="$1/notify" SYSTEMD_UNIT_PATH="$1/units" \
    /lib/systemd/systemd --system --unit=basic.target
"""

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and control groups need root"),
    pytest.mark.skipif(not SYSTEMD.exists() or shutil.which("systemctl") is None, reason="no systemd here"),
]


def new_group() -> Path:
    """A control group for systemd to rule; skips the test where there is none to be had."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2":
            group = Path(place, f"systemd-of-{os.getpid()}")
            try:
                group.mkdir()
            except OSError as error:
                pytest.skip(f"no control group of version 2: {error}")
            return group
    pytest.skip("no control groups of version 2 here")


class Manager:
    """A systemd, of which *process* is the parent."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        (self.pid,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        self._pidfd = os.pidfd_open(int(self.pid))

    def end(self) -> None:
        """Process 1 of a namespace ends after all others in it."""
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        assert select.select([self._pidfd], [], [], TIMEOUT)[0]
        os.close(self._pidfd)

    def ctl(self, *words: str) -> str:
        command = ["nsenter", "-t", self.pid, "-m", "-p", "-C", "systemctl", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT).stdout

    def shown(self, unit: str) -> dict[str, str]:
        """What it says of *unit*."""
        return dict(line.split("=", 1) for line in self.ctl("show", unit).splitlines())

    def path(self, below: str) -> Path:
        """Where it has what is *below* its root."""
        return Path(f"/proc/{self.pid}/root", below)


def furnish(place: Path) -> None:
    """Units, the file that says what is served, and a group that may connect."""
    command = [sys.executable, ROOT / "share/generate.py", place / "usr", f"--bindir={DAEMON.parent}"]
    subprocess.run(command, check=True, timeout=TIMEOUT)
    shutil.copytree(place / "usr/lib/systemd/system", place / "units")
    for target in TARGETS:
        (place / f"units/{target}.target").write_text("[Unit]\nDefaultDependencies=no\n")
    said = f"append:{place / 'said'}"  # there is no journal
    (place / "units/vhost-user-qcow2@.service.d").mkdir()
    drop_in = place / "units/vhost-user-qcow2@.service.d/said.conf"
    drop_in.write_text(f"[Service]\nStandardOutput={said}\nStandardError={said}\n")
    settings = place / "etc/vhost-user-qcow2"
    settings.mkdir(parents=True)
    (settings / "disk.conf").write_text(f"IMAGE={place / 'disk'}\nOPTIONS=--cache=writeback --stats\n")
    (place / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n")
    (place / "etc/group").write_text("root:x:0:\nkvm:x:4242:\n")
    qcow2_tool_ok("create", place / "disk", "64M")


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    group = new_group()
    furnish(tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, (tmp_path / "said").open("wb") as said:
        notify.bind(str(tmp_path / "notify"))
        notify.settimeout(TIMEOUT)
        spaces = ["--mount", "--pid", "--cgroup", "--uts", "--ipc", "--fork", "--kill-child"]
        command = ["unshare", *spaces, "sh", "-c", ENTER, "sh", str(tmp_path)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            preexec_fn=lambda: (group / "cgroup.procs").write_text("0") and None,
        )
        try:
            while b"READY=1" not in notify.recv(4096).split(b"\n"):
                assert process.poll() is None, (tmp_path / "said").read_text()
            manager = Manager(process)
            yield manager
            manager.end()
        finally:
            process.kill()
            process.wait(TIMEOUT)
            for directory, _, _ in os.walk(group, topdown=False):
                os.rmdir(directory)


def test_a_socket_starts_the_service_that_outlives_a_kill_and_ends_cleanly(manager: Manager, tmp_path: Path) -> None:
    disk_socket, service = UNITS
    path = manager.path("run/vhost-user-qcow2/disk.sock")
    manager.ctl("start", disk_socket)
    assert (stat.S_IMODE(path.stat().st_mode), path.stat().st_gid) == (0o660, 4242)
    assert manager.shown(service)["ActiveState"] == "inactive"
    with FrontEnd(path) as guest:
        guest.write(0, b"1" * 4096)
        guest.flush()
        assert manager.shown(service)["SubState"] == "running"
        manager.ctl("kill", "--signal=KILL", "--kill-who=main", service)
    with FrontEnd(path) as guest:
        assert guest.read(0, 4096) == b"1" * 4096
        guest.write(4096, b"2" * 4096)
        assert manager.shown(service)["NRestarts"] == "1"
    manager.ctl("stop", *UNITS)
    shown = manager.shown(service)
    assert (shown["ActiveState"], shown["Result"]) == ("inactive", "success")
    assert not path.exists()
    assert_not_corrupt(tmp_path / "disk")
    assert '"requests": 2' in (tmp_path / "said").read_text()


def test_a_service_without_an_image_fails_and_says_why(manager: Manager, tmp_path: Path) -> None:
    (tmp_path / "disk").unlink()
    with pytest.raises(subprocess.CalledProcessError):
        manager.ctl("start", UNITS[1])
    assert f"{tmp_path / 'disk'}: No such file or directory" in (tmp_path / "said").read_text()
