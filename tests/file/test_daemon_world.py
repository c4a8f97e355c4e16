"""The daemon in the world as it is: signals, limits, what its parent left closed, a host that is short of things."""

import contextlib
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.frontend import FLUSH, IOERR, OK, OUT, SET_VRING_CALL, BackendGone, FrontEnd
from tests.listening import visit
from tests.oracle import assert_clean
from tests.program import DAEMON, TIMEOUT, TOOL, Daemon, qcow2_tool_ok
from tests.slowdisk import SlowDisk

ROOT = Path(__file__).resolve().parents[2]
STOPPING = ["SIGTERM", "SIGHUP", "SIGINT", "SIGQUIT", "SIGPWR", "SIGXCPU"]
FATAL = ["SIGKILL", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT", "SIGTRAP", "SIGSYS"]  # of one that is broken
PAUSING = ["SIGSTOP", "SIGTSTP"]  # somebody wants just that
STRAY = [*sorted({number.name for number in signal.Signals} - {*STOPPING, *FATAL, *PAUSING}), "34", "64"]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qcow2_tool_ok("create", "-o", "compat=1.1,lazy_refcounts=on", path, "64M")
    return path


@contextlib.contextmanager
def started(image: Path, *options: str, prepare: Callable[[], None] | None = None) -> Iterator["subprocess.Popen[str]"]:
    """A daemon on the socket `socket` beside *image*, of which *prepare* makes the surroundings."""
    command = [str(DAEMON), f"--blk-file={image}", f"--socket-path={image.with_name('socket')}", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=prepare) as process:
        try:
            yield process
        finally:
            process.kill()


# Signals


@pytest.mark.parametrize("name", STOPPING)
def test_signal_that_ends_a_process_ends_it_cleanly(image: Path, name: str) -> None:
    with Daemon(image) as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(0, b"x" * 4096)
        daemon.stop(signal.Signals[name])
    assert_clean(image)
    assert "cleanly shut down: no" not in subprocess.check_output(["qemu-img", "info", image], text=True)


def test_stray_signals_change_nothing(image: Path) -> None:
    with Daemon(image) as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(0, b"x" * 4096)
        for name in STRAY:
            daemon.process.send_signal(signal.Signals[name] if name.startswith("SIG") else int(name))
            assert guest.do(OUT, 4096, b"y" * 512).status == OK, name
            assert daemon.process.poll() is None, name
        daemon.stop()


def test_nohup_is_heeded(image: Path) -> None:
    with Daemon(image, under=["nohup"]) as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(0, b"x" * 4096)
        daemon.process.send_signal(signal.SIGHUP)
        guest.write(0, b"y" * 4096)
        daemon.stop()


def test_signals_that_its_parent_blocked_end_it_all_the_same(image: Path) -> None:
    blocking = f"signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); os.execv({str(DAEMON)!r}, sys.argv[1:])"
    under = [sys.executable, "-c", f"import os, signal, sys; {blocking}"]
    with Daemon(image, under=under) as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(0, b"x" * 4096)
        daemon.stop()


# Standard input, output and error


def close_stdio() -> None:
    for fd in range(3):
        os.close(fd)


def test_closed_stdio_is_no_place_for_an_image(image: Path) -> None:
    command = [DAEMON, f"--blk-file={image}", f"--socket-path={image.with_name('socket')}", "--stats"]
    process = subprocess.Popen(command, preexec_fn=close_stdio)
    with visit(process, image.with_name("socket")) as guest:
        guest.write(0, b"x" * 512)
        assert {os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in range(3)} == {"/dev/null"}
    process.terminate()
    assert process.wait(TIMEOUT) == 0
    assert_clean(image)


@pytest.mark.parametrize("arguments", [["info"], ["check", "-r", "all"], ["resize"]])
def test_tool_with_closed_stdio_does_not_write_into_the_image(image: Path, arguments: list[str]) -> None:
    more = ["+1M"] if arguments == ["resize"] else []
    subprocess.run([TOOL, *arguments, image, *more], preexec_fn=close_stdio, check=True, timeout=TIMEOUT)
    assert_clean(image)


# Descriptors


def test_soft_limit_of_descriptors_is_raised(image: Path) -> None:
    with Daemon(image, under=["prlimit", "--nofile=64:4096"]) as daemon, FrontEnd(daemon.socket_path):
        assert resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)[0] == 4096


@pytest.mark.parametrize("option", ["--socket-path", "--control"])
def test_no_descriptor_for_a_visitor_is_told_and_waited_for(image: Path, tmp_path: Path, option: str) -> None:
    control = tmp_path / "control"
    with started(image, f"--control={control}") as process:
        with visit(process, tmp_path / "socket"):
            pass
        before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (4, before[1]))
        path = control if option == "--control" else tmp_path / "socket"
        with socket.socket(socket.AF_UNIX) as visitor:
            visitor.settimeout(TIMEOUT)
            visitor.connect(str(path))
            assert process.stderr is not None
            assert process.stderr.readline() == "vhost-user-qcow2: nobody can be let in for now: Too many open files\n"
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before)
            if option == "--control":
                assert visitor.recv(1)
        with FrontEnd(tmp_path / "socket") as guest:
            guest.write(0, b"x" * 512)
        process.terminate()
        assert process.wait(TIMEOUT) == 0


def test_no_descriptor_for_what_a_message_brings_is_named(image: Path, tmp_path: Path) -> None:
    with started(image) as process:
        with visit(process, tmp_path / "socket") as guest:
            guest.write(0, b"x" * 512)
            before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (4, before[1]))
            with contextlib.suppress(BackendGone):
                guest.tell(SET_VRING_CALL, struct.pack("<Q", 0), fds=(0,))
            assert process.stderr is not None
            assert "descriptors" in process.stderr.readline()
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before)
        with FrontEnd(tmp_path / "socket") as guest:
            guest.write(0, b"x" * 512)


# Threads


@pytest.mark.parametrize("options", [(), ("--aio=threads",)])
def test_no_thread_at_the_start_is_one_line(image: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    refusing = [sys.executable, "-m", "tests.refused", "EAGAIN", "threads"]
    command = [*refusing, DAEMON, f"--blk-file={image}", f"--socket-path={tmp_path / 'socket'}", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "thread" in done.stderr
    assert not (tmp_path / "socket").exists()
    assert_clean(image)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become the user who may have no more processes")
def test_work_that_io_uring_cannot_get_a_thread_for_is_done_all_the_same(image: Path, tmp_path: Path) -> None:
    """The kernel cancels it (ECANCELED); a sync of it has not failed, and no write is refused from then on."""
    user = 54321
    os.chmod(image, 0o666)
    for path in (tmp_path, *tmp_path.parents):
        with contextlib.suppress(PermissionError):
            os.chmod(path, path.stat().st_mode | 0o011)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NPROC, (2, 2))  # the main thread and the worker
        os.setgid(user)
        os.setuid(user)

    os.chmod(tmp_path, 0o777)
    with started(image, "--aio=io_uring", prepare=limit) as process:
        with visit(process, tmp_path / "socket") as guest:
            for number in range(3):
                for i in range(8):
                    guest.submit(OUT, (number * 8 + i) << 18, bytes([i + 1]) * 262144)
                guest.submit(FLUSH)
                statuses: list[int] = []
                while len(statuses) < 9:
                    statuses += [done.status for done in guest.wait()]
                assert statuses == [OK] * 9
        process.terminate()
        assert process.wait(TIMEOUT) == 0
    assert_clean(image)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount, and become the user who may have no more processes")
def test_work_on_a_far_file_without_a_thread_fails_and_nothing_after_it() -> None:
    """It may hang, so the worker does not do it; it was never tried, so it ends no writes."""
    user = 54322
    with tempfile.TemporaryDirectory(prefix="far-", dir="/var/tmp") as name:
        place = Path(name)
        os.chmod(place, 0o777)
        for part in ("backing", "slow"):
            (place / part).mkdir()
        with SlowDisk(place / "backing", place / "slow"):
            qcow2_tool_ok("create", place / "slow/disk", "64M")
            os.chmod(place / "backing/disk", 0o666)
            (place / "disk").symlink_to(place / "slow/disk")

            def limit() -> None:
                resource.setrlimit(resource.RLIMIT_NPROC, (2, 1000))  # the main thread and the worker
                os.setgid(user)
                os.setuid(user)

            with started(place / "disk", "--aio=io_uring", prepare=limit) as process:
                with visit(process, place / "socket") as guest:
                    statuses = {guest.do(OUT, number << 20, b"1" * 65536).status for number in range(8)}
                    assert statuses | {guest.do(FLUSH).status} == {IOERR}
                    raised = ["prlimit", f"--pid={process.pid}", "--nproc=1000:1000"]
                    subprocess.run(raised, check=True, user=user, group=user, extra_groups=[])
                    for number in range(8):
                        guest.write(number << 20, b"2" * 65536)
                    guest.flush()
                process.terminate()
                assert process.wait(TIMEOUT) == 0
            assert_clean(place / "slow/disk")


# Memory


@pytest.mark.parametrize("command", [[TOOL, "map"], [DAEMON, "--fd=0", "--blk-file"]])
def test_no_memory_is_one_line(tmp_path: Path, command: list[str | Path]) -> None:
    path = tmp_path / "wide.qcow2"
    qcow2_tool_ok("create", "-o", "cluster_size=2M", path, f"{1 << 60}")  # an L1 table of 16 MiB
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        line = ["prlimit", f"--as={56 << 20}", *command, path]
        done = subprocess.run(line, stdin=listener, capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "memory" in done.stderr
    assert_clean(path)


def limit_memory(pid: int, nbytes: int) -> None:
    resource.prlimit(pid, resource.RLIMIT_AS, (nbytes, resource.RLIM_INFINITY))


def test_little_address_space_is_left_for_what_is_needed(tmp_path: Path) -> None:
    """Whether a front-end's memory fits is no chance: glibc reserves 64 MiB for each thread's heap, a window 1 GiB."""
    path = tmp_path / "disk"
    qcow2_tool_ok("create", path, "1M")
    limited = partial(limit_memory, 0, 3 << 30)
    with started(path, prepare=limited) as process, visit(process, tmp_path / "socket") as guest:
        guest.write(0, b"1" * 4096)
        assert [guest.read(0, 4096) for _ in range(3)] == [b"1" * 4096] * 3
        status = Path(f"/proc/{process.pid}/status").read_text()
    peak = re.search(r"VmPeak:\s+(\d+) kB", status)
    assert peak is not None
    assert int(peak[1]) < 120 << 10


@pytest.mark.parametrize("cache", ["writeback", "writethrough"])
def test_writes_that_find_no_memory_fail_alone(tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy takes a buffer, and finds none before anything has happened: later ones succeed, and the end is clean."""
    for name, value in {"MMAP_THRESHOLD_": 128 << 10, "ARENA_MAX": 1}.items():
        monkeypatch.setenv(f"MALLOC_{name}", str(value))  # or the C library has some aside
    path = tmp_path / "disk"
    (tmp_path / "base").write_bytes(b"b" * (32 << 20))
    qcow2_tool_ok("create", "-o", "cluster_size=2M", "-b", tmp_path / "base", "-F", "raw", path, "32M")
    with started(path, f"--cache={cache}") as process, visit(process, tmp_path / "socket") as guest:
        guest.write(0, b"1" * 512)
        limit_memory(process.pid, 1)
        statuses = {guest.do(OUT, number << 21, b"2" * 512).status for number in range(1, 16)}
        assert IOERR in statuses
        limit_memory(process.pid, resource.RLIM_INFINITY)
        for number in range(1, 16):
            guest.write(number << 21, b"3" * 512)
        guest.flush()
        assert all(guest.read(number << 21, 1024) == b"3" * 512 + b"b" * 512 for number in range(1, 16))
        process.terminate()
        assert process.wait(TIMEOUT) == 0
        assert process.stderr is not None
        assert "Cannot allocate memory" in process.stderr.read()
    assert_clean(path)


def test_no_memory_for_the_guests_memory_is_said(image: Path, tmp_path: Path) -> None:
    with started(image) as process:
        with visit(process, tmp_path / "socket"):
            pass
        limit_memory(process.pid, 1)
        with pytest.raises((AssertionError, BackendGone)):
            FrontEnd(tmp_path / "socket")
        assert process.stderr is not None
        said = process.stderr.readline()
        assert said.startswith("vhost-user-qcow2: the front-end is refused SET_MEM_TABLE: memory region at ")
        assert said.endswith(": Cannot allocate memory\n")
        limit_memory(process.pid, resource.RLIM_INFINITY)
        with FrontEnd(tmp_path / "socket") as guest:
            guest.write(0, b"x" * 512)


# Standard error that nobody reads


def test_full_pipe_of_messages_stops_nobody(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as pipe, os.fdopen(writer, "wb", buffering=0) as full:
        command = [str(DAEMON), f"--blk-file={image}", f"--socket-path={path}"]
        process = subprocess.Popen(command, stderr=full)
        with visit(process, path) as guest:
            guest.write(0, b"x" * 512)
        os.set_blocking(writer, False)  # the daemon shares that
        while full.write(bytes(4096)) is not None:
            pass
        os.set_blocking(writer, True)
        for _ in range(3):
            with socket.socket(socket.AF_UNIX) as rude:
                rude.settimeout(TIMEOUT)
                rude.connect(str(path))
                rude.sendall(b"\xff" * 12)  # which is told of
                assert rude.recv(1) == b""
        with FrontEnd(path) as guest:
            guest.write(0, b"y" * 512)
        process.terminate()
        assert process.wait(TIMEOUT) == 0
        full.close()
        assert not pipe.read().strip(b"\0")
    assert_clean(image)
