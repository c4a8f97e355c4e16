"""How the daemon starts and why it refuses to: sockets, inherited descriptors, images, one line on stderr."""

import errno
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import qcow2
from tests.listening import visit
from tests.program import DAEMON, TIMEOUT, complaints, qcow2_tool, qcow2_tool_ok

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(SIZE))
    return path


def run(*arguments: str | Path, pass_fds: tuple[int, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run the daemon with options that make it end by itself."""
    command = [DAEMON, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, pass_fds=pass_fds)


def start(*arguments: str | Path, pass_fds: tuple[int, ...] = ()) -> "subprocess.Popen[str]":
    command = [DAEMON, "--format=raw", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, pass_fds=pass_fds)


def ends_well(process: "subprocess.Popen[str]") -> bool:
    _, said = process.communicate(timeout=TIMEOUT)
    return process.returncode == 0 and complaints(said) == ""


@pytest.fixture
def listening(image: Path, tmp_path: Path) -> Iterator[tuple["subprocess.Popen[str]", Path]]:
    """A daemon that made its own socket."""
    path = tmp_path / "own.sock"
    process = start(f"--blk-file={image}", f"--socket-path={path}")
    yield process, path
    process.kill()
    process.communicate(timeout=TIMEOUT)


def refuses(done: "subprocess.CompletedProcess[str]", *words: str) -> bool:
    """It failed with one line of ours that holds *words*."""
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("vhost-user-qcow2: ")
    for word in words:
        assert word in done.stderr
    return True


# Sockets


def test_socket_is_made_and_removed(listening: tuple["subprocess.Popen[str]", Path]) -> None:
    process, path = listening
    with visit(process, path) as guest:
        assert guest.size == SIZE
    process.terminate()
    assert ends_well(process)
    assert not path.exists()


def test_stale_socket_is_replaced(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    process = start(f"--blk-file={image}", f"--socket-path={path}")
    with visit(process, path) as guest:
        assert guest.size == SIZE
    process.terminate()
    assert ends_well(process)


@pytest.mark.parametrize("option", ["--socket-path", "--control"])
@pytest.mark.parametrize("is_live", [False, True])
def test_path_that_another_took_meanwhile_is_left_to_it(
    image: Path, tmp_path: Path, option: str, *, is_live: bool
) -> None:
    path = tmp_path / "taken.sock"
    with opening(image, path, f"--socket-path={tmp_path}/own.sock", f"{option}={path}") as (process, go_on):
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            if is_live:
                other.bind(str(path))
                other.listen()
            else:
                path.touch()
            go_on()
            _, said = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert f"{path} is gone, or another process" in said
    assert path.exists()


@pytest.mark.parametrize("options", [(), ("--sandbox",)])
def test_control_socket_that_is_gone_costs_no_guest_its_disk(
    image: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    path, own = tmp_path / "gone.sock", tmp_path / "own.sock"
    with opening(image, path, f"--socket-path={own}", f"--control={path}", *options) as (process, go_on):
        path.unlink()
        go_on()
        with visit(process, own) as guest:
            assert guest.read(0, 512) == bytes(512)
        process.terminate()
        _, said = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0
    assert [f"{path} is gone" in line for line in said.splitlines() if str(path) in line] == [True]


@contextmanager
def opening(image: Path, path: Path, *options: str) -> Iterator[tuple["subprocess.Popen[str]", Callable[[], None]]]:
    """A daemon that has *path*, and opens *image* only after a call of what comes with it."""
    with qcow2.open(str(image), format="raw", writable=True) as disk:
        disk.flush()  # so that its end takes no time: the daemon waits a second for it
        with start(f"--blk-file={image}", *options) as process:
            try:
                while not path.exists():
                    assert process.poll() is None
                yield process, disk.close
            finally:
                process.kill()
