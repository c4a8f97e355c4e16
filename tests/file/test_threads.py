"""Where io_uring is forbidden the daemon works through threads, says so once, and keeps every promise."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.frontend import FrontEnd
from tests.oracle import assert_clean
from tests.program import DAEMON, TIMEOUT, Daemon, qcow2_tool_ok

ROOT = Path(__file__).resolve().parents[2]
NOTICE = "vhost-user-qcow2: io_uring is not to be had: {}; using threads\n"
WORDS = {
    "EPERM": "Operation not permitted",
    "ENOSYS": "Function not implemented",
    "ENOMEM": "Cannot allocate memory",  # a limit of locked memory
    "EMFILE": "Too many open files",
}
WORKER_TESTS = ["operations", "sync", "queues", "memory", "hostile", "serving"]


def forbidding(refusal: str, calls: str = "io_uring") -> list[str]:
    """A command that runs another where *calls* of io_uring fail with *refusal*."""
    return [sys.executable, "-m", "tests.refused", refusal, calls]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qcow2_tool_ok("create", "-o", "compat=1.1,lazy_refcounts=on", path, "64M")
    return path


def rings_of(pid: int) -> int:
    """How many io_urings a process holds."""
    rings = 0
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            rings += os.readlink(fd) == "anon_inode:[io_uring]"
    return rings


def use(daemon: Daemon) -> None:
    with FrontEnd(daemon.socket_path) as front_end:
        front_end.write(1 << 20, b"x" * 200_000 + bytes(4800))
        front_end.flush()
        front_end.write(1 << 20, b"y" * 512)
        assert front_end.read(1 << 20, 1024) == b"y" * 512 + b"x" * 512


@pytest.mark.parametrize("refusal", WORDS)
def test_forbidden_io_uring_is_told_once_and_threads_serve(image: Path, refusal: str) -> None:
    with Daemon(image, under=forbidding(refusal)) as daemon:
        use(daemon)
        use(daemon)
        assert rings_of(daemon.process.pid) == 0
        daemon.process.send_signal(signal.SIGTERM)
        _, said = daemon.process.communicate(timeout=TIMEOUT)
        assert (daemon.process.returncode, said) == (0, NOTICE.format(WORDS[refusal]))
    assert_clean(image)


def test_ring_that_may_be_made_and_not_entered_is_none(image: Path) -> None:
    with Daemon(image, under=forbidding("EPERM", "io_uring_enter")) as daemon:
        use(daemon)
        assert rings_of(daemon.process.pid) == 0
        daemon.process.send_signal(signal.SIGTERM)
        _, said = daemon.process.communicate(timeout=TIMEOUT)
        assert (daemon.process.returncode, said) == (0, NOTICE.format(WORDS["EPERM"]))


def test_threads_that_were_asked_for_are_not_worth_a_word(image: Path) -> None:
    with Daemon(image, "--aio=threads") as daemon:
        use(daemon)
        assert rings_of(daemon.process.pid) == 0
        daemon.process.send_signal(signal.SIGTERM)
        _, said = daemon.process.communicate(timeout=TIMEOUT)
        assert (daemon.process.returncode, said) == (0, "")


def test_io_uring_that_was_asked_for_is_not_replaced(image: Path, tmp_path: Path) -> None:
    command = [*forbidding("EPERM"), DAEMON, f"--blk-file={image}", f"--socket-path={tmp_path / 's'}", "--aio=io_uring"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 1
    assert "Operation not permitted" in done.stderr
    assert "io_uring" in done.stderr


def blocked_signals(task: Path) -> int:
    """Bit n - 1 is signal n."""
    (line,) = (line for line in (task / "status").read_text().splitlines() if line.startswith("SigBlk:"))
    return int(line.split()[1], 16)


def test_signals_are_for_the_main_thread_alone(image: Path, tmp_path: Path) -> None:
    """The kernel may give SIGTERM to any thread that does not block it, and then the main thread sleeps on."""
    with Daemon(image, "--aio=threads", f"--control={tmp_path / 'control'}") as daemon:
        use(daemon)
        tasks = {int(task.name): task for task in Path(f"/proc/{daemon.process.pid}/task").iterdir()}
        main = tasks.pop(daemon.process.pid)
        ending = 1 << signal.SIGTERM - 1 | 1 << signal.SIGINT - 1
        assert blocked_signals(main) & ending == 0
        assert len(tasks) >= 3  # worker, control socket, I/O
        assert {blocked_signals(task) & ending for task in tasks.values()} == {ending}


def test_threads_are_bounded(image: Path) -> None:
    with Daemon(image, "--aio=threads") as daemon:
        use(daemon)
        before = len(os.listdir(f"/proc/{daemon.process.pid}/task"))
        for _ in range(20):
            use(daemon)
        assert len(os.listdir(f"/proc/{daemon.process.pid}/task")) <= before + 16
        daemon.stop()


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", WORKER_TESTS)
def test_worker_keeps_its_promises_without_io_uring(name: str) -> None:
    command = [
        *forbidding("EPERM"),
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        f"tests/file/test_worker_{name}.py",
    ]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PATH": path}, timeout=TIMEOUT
    )
    assert done.returncode == 0, done.stdout
