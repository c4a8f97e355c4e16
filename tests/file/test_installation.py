"""`make install` gives programs that run by themselves and files that name them; `make uninstall` takes all away."""

import json
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.frontend import FrontEnd
from tests.program import TIMEOUT, Daemon

pytestmark = pytest.mark.xdist_group("installation")  # installed once

ROOT = Path(__file__).resolve().parents[2]
DEEP = pytest.mark.skipif("INSTALL" not in os.environ, reason="takes a while: make install-test")


@dataclass(frozen=True)
class Installed:
    destination: Path
    prefix: str

    def below(self, path: str) -> Path:
        return self.destination / path.lstrip("/")

    def make(self, target: str) -> None:
        given = [f"DESTDIR={self.destination}", f"PREFIX={self.prefix}"]
        # What runs this test is not to be built anew meanwhile.
        done = run("make", "-o", ".venv/installed", target, *given, cwd=ROOT)
        assert done.returncode == 0, done.stderr

    def program(self, name: str, *arguments: str | Path) -> str:
        done = run(self.below(f"{self.prefix}/bin/{name}"), *arguments, cwd=Path("/"), env={})
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=5 * TIMEOUT, check=False)


@pytest.fixture(
    scope="module",
    params=["/usr/local", pytest.param("/usr", marks=DEEP), pytest.param("/opt/disk/", marks=DEEP)],
)
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """Installed below a directory in which somebody keeps a file; only that is there afterwards."""
    installed = Installed(tmp_path_factory.mktemp("destination"), request.param)
    kept = installed.below(f"{request.param}/share/man/man1/another.1")
    kept.parent.mkdir(parents=True)
    kept.touch()
    installed.make("install")
    yield installed
    installed.make("uninstall")
    assert [path for path in installed.destination.rglob("*") if not path.is_dir()] == [kept]
    assert list(kept.parents[2].iterdir()) == [kept.parents[1]]


def test_programs_say_their_version(installed: Installed) -> None:
    version = installed.program("qcow2", "--version").split()[-1]
    assert version == installed.program("vhost-user-qcow2", "--version").split()[-1]
    assert version in installed.below(f"{installed.prefix}/share/man/man1/qcow2.1").read_text()


def test_programs_do_their_work(installed: Installed, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    installed.program("qcow2", "create", image, "1M")
    assert json.loads(installed.program("qcow2", "info", "--output=json", image))["virtual-size"] == 1 << 20
    assert json.loads(installed.program("vhost-user-qcow2", "--print-capabilities"))["type"] == "block"


def test_daemon_finds_the_program_that_exports(
    installed: Installed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.program.DAEMON", installed.below(f"{installed.prefix}/bin/vhost-user-qcow2"))
    image, control = tmp_path / "disk.qcow2", f"--control={tmp_path}/control"
    installed.program("qcow2", "create", image, "1M")
    with Daemon(image, control, under=("env", "-i", "-C", "/")) as daemon, FrontEnd(daemon.socket_path):
        installed.program("vhost-user-qcow2", "ctl", control, "snapshot", "frozen")
        installed.program("vhost-user-qcow2", "ctl", control, "export", "start", "frozen", f"--socket={tmp_path}/nbd")
        assert (tmp_path / "nbd").is_socket()


def test_only_what_this_project_has_is_installed(installed: Installed) -> None:
    library = installed.below(f"{installed.prefix}/lib/vhost-user-qcow2")
    for room in ("ring", "virtio", "vhost", "qcow2"):
        for module in (library / room).rglob("*.py"):
            assert (ROOT / module.relative_to(library)).exists(), module


def test_discovery_file_and_units_name_the_program(installed: Installed) -> None:
    prefix = installed.prefix.rstrip("/")
    discovery = "/etc/qemu" if prefix == "/usr/local" else f"{prefix}/share/qemu"
    found = json.loads(installed.below(f"{discovery}/vhost-user/50-vhost-user-qcow2.json").read_text())
    assert found["binary"] == f"{prefix}/bin/vhost-user-qcow2"
    unit = installed.below(f"{prefix}/lib/systemd/system/vhost-user-qcow2@.service").read_text()
    assert f"ExecStart={prefix}/bin/vhost-user-qcow2 " in unit


@DEEP
def test_installing_again_leaves_no_file_of_before(installed: Installed) -> None:
    """An earlier version may have had other files."""
    old = f"{installed.prefix.rstrip('/')}/share/man/man1/old.1"
    installed.below(old).touch()
    with installed.below(f"{installed.prefix}/lib/vhost-user-qcow2/files").open("a") as files:
        files.write(f"{old}\n")
    installed.make("install")
    assert not installed.below(old).exists()
    installed.program("qcow2", "--version")


@DEEP
def test_two_installs_of_one_clone_at_once(tmp_path: Path) -> None:
    """Each deletes, builds and copies in the same `build`."""
    places = [Installed(tmp_path / name, "/usr/local") for name in ("one", "two")]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda place: place.make("install"), places))
    for place in places:
        place.program("qcow2", "--version")
