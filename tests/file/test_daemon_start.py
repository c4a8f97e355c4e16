"""How the daemon starts and why it refuses to: sockets, inherited descriptors, images, one line on stderr."""

import errno
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
@pytest.mark.parametrize("is_listening", [True, False])
def test_live_socket_is_refused_and_left_alone(image: Path, tmp_path: Path, option: str, is_listening: bool) -> None:
    """A daemon that repairs its image has a socket and does not listen yet."""
    path = tmp_path / "live.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        if is_listening:
            other.listen()
        identity = path.lstat().st_ino
        done = run(f"--blk-file={image}", "--format=raw", f"--socket-path={tmp_path}/own.sock", f"{option}={path}")
        assert refuses(done, str(path), "in use")
        assert path.lstat().st_ino == identity


def test_file_that_is_no_socket_is_refused_and_left_alone(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    assert refuses(run(f"--blk-file={image}", "--format=raw", f"--socket-path={path}"), str(path), "not a socket")
    assert path.read_text() == "mine"


@pytest.mark.parametrize("length", [0, 108, 300])
def test_socket_path_that_does_not_fit_is_refused(image: Path, length: int) -> None:
    path = "s" * length
    assert refuses(run(f"--blk-file={image}", "--format=raw", f"--socket-path={path}"), f"{length} bytes", "107")


def test_longest_socket_path_is_accepted(image: Path, tmp_path: Path) -> None:
    path = tmp_path / ("s" * (107 - len(str(tmp_path)) - 1))
    process = start(f"--blk-file={image}", f"--socket-path={path}")
    with visit(process, path) as guest:
        assert guest.size == SIZE
    process.terminate()
    assert ends_well(process)


def test_directory_that_does_not_exist_is_named(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "a.sock"
    assert refuses(run(f"--blk-file={image}", "--format=raw", f"--socket-path={path}"), str(path), "No such file")


def test_connected_fd_serves_one_front_end_and_ends(image: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    process = start(f"--blk-file={image}", f"--fd={theirs.fileno()}", pass_fds=(theirs.fileno(),))
    theirs.close()
    with ours:
        ours.settimeout(TIMEOUT)
        ours.sendall(bytes([1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]))
        assert ours.recv(64)[:8] == bytes([1, 0, 0, 0, 5, 0, 0, 0])
    assert ends_well(process)


def test_fd_that_is_not_open_is_refused(image: Path) -> None:
    assert refuses(run(f"--blk-file={image}", "--format=raw", "--fd=123"), "123", "Bad file descriptor")


def test_fd_that_is_no_socket_is_refused(image: Path) -> None:
    assert refuses(run(f"--blk-file={image}", "--format=raw", "--fd=0"), "0", "not a")


def test_socket_of_another_kind_is_refused(image: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as other:
        done = run(f"--blk-file={image}", "--format=raw", f"--fd={other.fileno()}", pass_fds=(other.fileno(),))
    assert refuses(done, "not a Unix stream socket")


# Images


def test_socket_is_looked_at_before_the_image(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    assert refuses(run(f"--blk-file={tmp_path}/missing", f"--socket-path={path}"), "not a socket")


def test_missing_image_is_named_and_no_socket_stays(tmp_path: Path) -> None:
    missing, path = tmp_path / "missing.qcow2", tmp_path / "a.sock"
    assert refuses(run(f"--blk-file={missing}", f"--socket-path={path}"), str(missing), "No such file")
    assert not path.exists()


def test_signal_at_the_end_does_not_hide_how_it_went(image: Path, tmp_path: Path) -> None:
    """From the line that says why until the process is gone; and after a clean end."""
    path = tmp_path / "socket"
    with start(f"--socket-path={path}", f"--blk-file={tmp_path}/absent") as failing:
        assert failing.stderr is not None
        assert "absent" in failing.stderr.readline()
        while failing.poll() is None:
            failing.terminate()
    with start(f"--socket-path={path}", f"--blk-file={image}") as serving:
        with visit(serving, path):
            pass
        while serving.poll() is None:
            serving.terminate()
    assert (failing.returncode, serving.returncode) == (1, 0)


def test_format_is_not_guessed(image: Path, tmp_path: Path) -> None:
    assert refuses(run(f"--blk-file={image}", f"--socket-path={tmp_path}/a.sock"), str(image), "qcow2")


def test_directory_is_not_an_image(tmp_path: Path) -> None:
    assert refuses(run(f"--blk-file={tmp_path}", "--format=raw", f"--socket-path={tmp_path}/a.sock"), str(tmp_path))


def test_image_in_use_is_refused(listening: tuple["subprocess.Popen[str]", Path], image: Path, tmp_path: Path) -> None:
    process, path = listening
    with visit(process, path):
        done = run(f"--blk-file={image}", "--format=raw", f"--socket-path={tmp_path}/b.sock")
    assert refuses(done, str(image), "lock")


def test_bad_option_is_one_line() -> None:
    assert refuses(run("--num-queues=0", "--blk-file=a", "--socket-path=b"), "--num-queues", "256")


def test_capabilities_are_printed_as_the_conventions_say() -> None:
    done = run("--print-capabilities", "--blk-file=missing")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == '{"type": "block", "features": ["blk-file", "read-only"]}\n'


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_repair_which_the_next_open_finishes(tmp_path: Path, number: signal.Signals) -> None:
    image = tmp_path / "dirty.qcow2"
    qcow2_tool_ok("create", "-o", "lazy_refcounts=on,preallocation=metadata", image, "64G")
    with image.open("r+b") as file:  # the dirty bit
        file.seek(72)
        file.write((1).to_bytes(8, "big"))
    command = [DAEMON, f"--blk-file={image}", f"--socket-path={tmp_path / 'socket'}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "repairing" in process.stderr.readline()
        process.send_signal(number)
        _, said = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0
    assert all("repairing, " in line for line in said.splitlines()), said  # on a busy machine it says how far it is
    with qcow2.open(str(image), writable=True) as disk:
        assert disk.read(0, 512) == bytes(512)
    assert qcow2_tool("check", image).returncode == 0


# When front-ends may come


def test_nobody_is_let_in_before_the_image_is_held(image: Path, tmp_path: Path) -> None:
    """A front-end that is refused comes back; QEMU 7.2 does not, once it was cut off in the greeting."""
    path = tmp_path / "early.sock"
    with qcow2.open(str(image), format="raw", writable=True):
        process = start(f"--blk-file={image}", f"--socket-path={path}")
        outcomes = set()
        while process.poll() is None:
            with socket.socket(socket.AF_UNIX) as early:
                outcomes.add(early.connect_ex(str(path)))
        _, said = process.communicate(timeout=TIMEOUT)
    assert "lock" in said
    assert outcomes <= {errno.ENOENT, errno.ECONNREFUSED}


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


def is_open(path: Path, pid: int) -> bool:
    """Whether the process has that file open."""
    with suppress(FileNotFoundError):
        return any(os.readlink(fd) == str(path.resolve()) for fd in Path(f"/proc/{pid}/fd").iterdir())
    return False


@contextmanager
def opening(image: Path, path: Path, *options: str) -> Iterator[tuple["subprocess.Popen[str]", Callable[[], None]]]:
    """A daemon that has *path*, and opens *image* only after a call of what comes with it."""
    with qcow2.open(str(image), format="raw", writable=True) as disk:
        disk.flush()  # so that its end takes no time: the daemon waits a second for it
        with start(f"--blk-file={image}", *options) as process:
            try:
                while not (path.exists() and is_open(image, process.pid)):  # from then on it knows its path
                    assert process.poll() is None
                yield process, disk.close
            finally:
                process.kill()
