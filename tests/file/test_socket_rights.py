"""Who may connect to the daemon's socket is what the command line says, from its first moment on."""

import os
import socket
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.program import DAEMON, TIMEOUT

GROUP = 12345  # of nobody


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    return path


@contextmanager
def daemon(image: Path, *options: str) -> Iterator[Path]:
    """A daemon that says it is ready; its socket."""
    path, notify = image.with_name("sock"), image.with_name("notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(notify))
        manager.settimeout(TIMEOUT)
        command = [DAEMON, f"--socket-path={path}", f"--blk-file={image}", "--format=raw", *options]
        with subprocess.Popen(command, env={**os.environ, "NOTIFY_SOCKET": str(notify)}) as process:
            try:
                assert manager.recv(100) == b"READY=1"
                yield path
            finally:
                process.kill()


def rights(path: Path) -> tuple[int, int]:
    found = os.lstat(path)
    return stat.S_IMODE(found.st_mode), found.st_gid


def test_mode_is_what_was_given_whatever_the_umask(image: Path) -> None:
    with daemon(image, "--socket-mode=0666") as path:
        assert rights(path) == (0o666, os.getegid())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives away to any group")
def test_group_may_connect(image: Path) -> None:
    with daemon(image, f"--socket-group={GROUP}") as path:
        assert rights(path) == (0o660, GROUP)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives away to any group")
def test_control_socket_stays_its_owners(image: Path, tmp_path: Path) -> None:
    control = tmp_path / "control"
    with daemon(image, f"--socket-group={GROUP}", "--socket-mode=666", f"--control={control}"):
        assert rights(control) == (0o600, os.getegid())


@pytest.mark.skipif(os.geteuid() != 0, reason="root may become another user")
def test_group_that_is_not_ours_leaves_no_socket(tmp_path: Path, image: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    os.chown(place, 65534, 65534)
    path = place / "sock"
    arguments = [f"--socket-path={path.name}", f"--blk-file={image}", "--format=raw", f"--socket-group={GROUP}"]
    os.chmod(place, 0o777)
    done = subprocess.run(
        ["setpriv", "--bounding-set=-chown", "--inh-caps=-chown", DAEMON, *arguments],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"group {GROUP}" in done.stderr
    assert not path.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--socket-path=s", "--socket-mode=0999"],
        ["--socket-path=s", "--socket-mode=4660"],
        ["--socket-path=s", "--socket-group=no such group"],
        ["--fd=0", "--socket-mode=0660"],
    ],
)
def test_nonsense_is_refused_on_one_line(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [DAEMON, "--blk-file=disk", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "--socket-" in done.stderr
