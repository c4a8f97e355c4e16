"""Where parts of the host are missing, as in containers and under a careful service manager: everything works on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.frontend import FrontEnd
from tests.oracle import assert_clean
from tests.program import TIMEOUT, TOOL, Daemon, qcow2_tool_ok

ROOT = Path(__file__).resolve().parents[2]
DEVICES = "mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9"
PLACES = {
    "processes-only": "mount -t proc -o subset=pid proc /proc",  # systemd's ProcSubset=pid
    "no-proc": "mount -t tmpfs none /proc",
    "no-shared-memory": f"mount -t tmpfs none /dev && {DEVICES}",
    "small-shared-memory": "mount -t tmpfs -o size=64k none /dev/shm",
    "read-only-shared-memory": "mount -t tmpfs -o ro none /dev/shm",
    "nothing": f"mount -t tmpfs none /dev && {DEVICES} && mount -t tmpfs none /proc",
}


def may_mount() -> bool:
    return os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not may_mount(), reason="mounts take root and a namespace")


def place(name: str) -> list[str]:
    """A command that runs another in a place of that *name*."""
    return ["unshare", "-m", "sh", "-c", f'{PLACES[name]} && exec "$@"', "sh"]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    base, path = tmp_path / "base.raw", tmp_path / "disk.qcow2"
    base.write_bytes(b"b" * (1 << 20))
    qcow2_tool_ok("create", "-b", base, "-F", "raw", path, "4M")
    return path


@pytest.mark.sample(6)
@pytest.mark.parametrize("options", [(), ("--sandbox", "--cache=none")])
@pytest.mark.parametrize("name", PLACES)
def test_daemon_serves(image: Path, name: str, options: tuple[str, ...]) -> None:
    with Daemon(image, *options, under=place(name)) as daemon:
        for fill in (b"1", b"2"):  # between the two nobody holds the image
            with FrontEnd(daemon.socket_path) as guest:
                guest.write(4096, fill * 512)
                guest.flush()
                assert guest.read(4096, 1024) == fill * 512 + b"b" * 512
        daemon.process.send_signal(signal.SIGTERM)
        _, said = daemon.process.communicate(timeout=TIMEOUT)
        assert daemon.process.returncode == 0, said
    assert_clean(image)


LIBRARY = """
import sys, qcow2
with qcow2.open(sys.argv[1], writable=True) as disk:
    disk.write(0, b"x" * 512)
    disk.flush()
    assert disk.read(0, 1024) == b"x" * 512 + b"b" * 512
"""
PROGRAMS: dict[str, list[str | Path]] = {
    "check": [TOOL, "check", "-r", "all"],
    "resize": [TOOL, "resize"],
    "library": [sys.executable, "-c", LIBRARY],
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", ["processes-only", "nothing"])
def test_tool_and_library_work(image: Path, name: str, program: str) -> None:
    more = ["+1M"] if program == "resize" else []
    command = [*place(name), *PROGRAMS[program], image, *more]
    subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT, cwd=ROOT)
    assert_clean(image)
