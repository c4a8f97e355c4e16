"""What a daemon in its sandbox can still do, and what it cannot."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qcow2
from tests.file.test_control import ask
from tests.frontend import BackendGone, FrontEnd
from tests.oracle import assert_clean, assert_not_corrupt
from tests.program import TIMEOUT, Daemon, complaints, qcow2_tool_ok
from vhost import Control, ControlError

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.raw"
    path.write_bytes(b"b" * MIB)
    return path


@pytest.fixture
def image(tmp_path: Path, base: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qcow2_tool_ok("create", "-b", base, "-F", "raw", path, "4M")
    return path


@pytest.fixture
def daemon(request: pytest.FixtureRequest, image: Path) -> Iterator[Daemon]:
    with Daemon(image, "--sandbox", *getattr(request, "param", ())) as daemon:
        yield daemon


def use(daemon: Daemon, fill: bytes) -> None:
    with FrontEnd(daemon.socket_path) as front_end:
        front_end.write(4096, fill * 512)
        front_end.flush()
        assert front_end.read(4096, 1024) == fill * 512 + b"b" * 512


@pytest.mark.parametrize("daemon", [(), ("--cache=none",), ("--aio=threads",)], indirect=True)
def test_image_is_served_let_go_taken_again_and_closed(daemon: Daemon, image: Path) -> None:
    use(daemon, b"1")
    use(daemon, b"2")  # between the two nobody held the image: it was opened anew, backing file and link log too
    daemon.process.send_signal(signal.SIGTERM)
    _, said = daemon.process.communicate(timeout=TIMEOUT)
    assert (daemon.process.returncode, complaints(said)) == (0, "")
    assert_clean(image)


def test_every_thread_has_lost_privileges_and_capabilities(daemon: Daemon) -> None:
    use(daemon, b"1")
    for task in Path(f"/proc/{daemon.process.pid}/task").iterdir():
        lines = (line.split(":", 1) for line in (task / "status").read_text().splitlines())
        status = {key: value.strip() for key, value in lines}
        assert status["NoNewPrivs"] == "1"
        for kind in ("CapEff", "CapPrm", "CapInh"):
            assert int(status[kind], 16) == 0
        assert int(status["CapBnd"], 16) == 0 or os.geteuid() != 0
        assert status["Seccomp"] == "2"  # a filter


@pytest.mark.parametrize("which", ["image", "base"])
def test_another_file_cannot_be_opened(daemon: Daemon, image: Path, base: Path, which: str) -> None:
    path = {"image": image, "base": base}[which]
    use(daemon, b"1")
    shutil.copy(path, f"{path}.other")
    os.replace(f"{path}.other", path)  # the same name and content, but a file that the sandbox knows nothing of
    with pytest.raises(BackendGone):
        use(daemon, b"2")
    daemon.process.send_signal(signal.SIGTERM)
    _, said = daemon.process.communicate(timeout=TIMEOUT)
    assert daemon.process.returncode == 0
    assert "Permission denied" in said


def test_without_the_sandbox_it_can(image: Path) -> None:
    with Daemon(image) as daemon:
        use(daemon, b"1")
        shutil.copy(image, f"{image}.other")
        os.replace(f"{image}.other", image)
        use(daemon, b"2")
        daemon.stop()


def test_disk_grows_in_the_sandbox(tmp_path: Path, image: Path) -> None:
    control = tmp_path / "control"
    with Daemon(image, "--sandbox", f"--control={control}") as daemon:
        with FrontEnd(daemon.socket_path) as front_end:
            assert ask(control, "resize", "8M") == {"size": 8 * MIB}
            front_end.write(8 * MIB - 512, b"z" * 512)
        daemon.stop()
        assert not control.exists()  # it may remove what is its own
    assert_clean(image)


def job(client: Control, kind: str, target: str) -> None:
    """It comes to its good end."""
    begun = client.wait((client.backup if kind == "backup" else client.mirror)(target).job)
    if kind == "mirror":
        assert begun.state == "ready", begun
        begun = client.wait(client.complete(begun.job).job)
    assert begun.state == "completed", begun


@pytest.mark.parametrize(
    ("options", "kind"),
    [(("--format=raw",), "backup"), (("--format=raw",), "mirror")],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_jobs_of_any_disk_make_files_in_the_directory_of_the_image(
    tmp_path: Path, image: Path, base: Path, options: tuple[str, ...], kind: str
) -> None:
    disk, control = base if "--format=raw" in options else image, tmp_path / "control"
    with Daemon(disk, "--sandbox", *options, f"--control={control}") as daemon, FrontEnd(daemon.socket_path):
        with Control(control) as client:
            job(client, kind, "copy")
        daemon.stop()
    assert (tmp_path / "copy").is_file()


def test_a_sandbox_makes_no_files_beside_what_is_read_only(tmp_path: Path, image: Path) -> None:
    control = tmp_path / "control"
    with Daemon(image, "--sandbox", "--read-only", f"--control={control}") as daemon, FrontEnd(daemon.socket_path):
        with Control(control) as client, pytest.raises(ControlError, match=r"beside .*, which is read only"):
            client.backup("copy")
        daemon.stop()
    assert not (tmp_path / "copy").exists()


def test_snapshot_may_lie_below_the_directory_of_the_image(tmp_path: Path, image: Path) -> None:
    (tmp_path / "below").mkdir()
    qcow2_tool_ok("rebase", "-u", "-b", "", image)  # which it would name from its directory
    control = tmp_path / "control"
    with Daemon(image, "--sandbox", f"--control={control}") as daemon, FrontEnd(daemon.socket_path) as guest:
        guest.write(0, b"1" * 512)
        ask(control, "snapshot", "below/frozen")
        guest.write(512, b"2" * 512)
        daemon.stop()
    with qcow2.open(image) as top, qcow2.open(tmp_path / "below" / "frozen") as frozen:
        assert top.read(0, 1024) == b"1" * 512 + b"2" * 512
        assert frozen.read(0, 1024) == b"1" * 512 + bytes(512)


@pytest.mark.parametrize("is_link", [True, False])
def test_what_the_sandbox_cannot_finish_can_be_left(tmp_path: Path, image: Path, is_link: bool) -> None:
    served, control = image, tmp_path / "control"
    (tmp_path / "below").mkdir()
    if is_link:
        served = tmp_path / "below" / "link"
        served.symlink_to(image)
    with Daemon(served, "--sandbox", f"--control={control}") as daemon, FrontEnd(daemon.socket_path):
        with Control(control) as client:
            mirror = client.wait(client.mirror("mirror" if is_link else "below/mirror").job)
            with pytest.raises(
                ControlError, match=r"mirror: is not in .*: --sandbox makes no symbolic link.*left only"
            ):
                client.complete(mirror.job)
            client.wait(client.cancel(mirror.job).job)
            assert (tmp_path / ("mirror" if is_link else "below/mirror")).is_file()
            for begin in (client.backup, client.mirror, client.snapshot):
                with pytest.raises(ControlError, match=rf"\.\./away: --sandbox leaves {tmp_path}$"):
                    begin("../away")
            job(client, "backup", "copy")
        daemon.stop()


# What somebody who has taken the daemon over can reach: each line of this runs confined as a daemon is.
ATTEMPTS = """
import contextlib, ctypes, mmap, os, signal, socket, sys
from vhost.sandbox import confine, seal
image, logs, others, somebody, path = sys.argv[1:]
confine(images=[image], changed=[image], log_directory=logs, sockets=[])
seal()
libc = ctypes.CDLL(None, use_errno=True)

def call(*arguments):
    if libc.syscall(*arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")

def open_socket(family, kind=socket.SOCK_STREAM):
    return socket.socket(family, kind)

attempts = {
    "open a file of root": lambda: open("/etc/shadow"),
    "open a log of another": lambda: open(others, "r+b"),
    "make a file beside it": lambda: open(others + ".new", "x"),
    "remove it": lambda: os.unlink(others),
    "connect": lambda: open_socket(socket.AF_UNIX).connect(path),
    "udp": lambda: open_socket(socket.AF_INET, socket.SOCK_DGRAM),
    "netlink": lambda: open_socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "a pair of sockets": lambda: socket.socketpair(),
    "signal another process": lambda: os.kill(int(somebody), 0),
    "signal it by its thread": lambda: call(%(tgkill)d, int(somebody), int(somebody), 0),
    "trace it": lambda: call(%(ptrace)d, 16, int(somebody), 0, 0),
    "limit it": lambda: call(%(prlimit64)d, int(somebody), 7, 0, 0),
    "run a program": lambda: os.execv("/bin/true", ["true"]),
    "fork": lambda: os.fork() or os._exit(0),
    "a ring": lambda: call(425, 4, bytes(120)),
    "a namespace": lambda: call(%(unshare)d, 0x10000000),
    "code that writes itself": lambda: mmap.mmap(-1, 4096, prot=7),
    "a keyring, bpf, page faults": lambda: [call(n, 0, 0, 0) for n in (%(keyctl)d, %(bpf)d, %(userfaultfd)d)],
    "x32": lambda: call(0x40000000 + 39),
}
for name, attempt in attempts.items():
    try:
        attempt()
    except OSError as error:
        continue
    print(name)
open(image, "r+b").close()
open(os.path.join(logs, "mine"), "x").close()
os.unlink(os.path.join(logs, "mine"))
"""
X86_64 = {"tgkill": 234, "ptrace": 101, "prlimit64": 302, "unshare": 272, "keyctl": 250, "bpf": 321, "userfaultfd": 323}
AARCH64 = {"tgkill": 131, "ptrace": 117, "prlimit64": 261, "unshare": 97, "keyctl": 219, "bpf": 280, "userfaultfd": 282}


def test_who_takes_the_daemon_over_reaches_nothing_else(tmp_path: Path, image: Path) -> None:
    numbers = X86_64 if os.uname().machine == "x86_64" else AARCH64
    logs, mine, path = tmp_path / "logs", tmp_path / "logs" / "mine", tmp_path / "socket"
    mine.mkdir(parents=True)
    (logs / "other").write_bytes(b"other")
    with socket.socket(socket.AF_UNIX) as listener, subprocess.Popen(["sleep", "60"]) as somebody:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen()
        arguments = map(str, (image, mine, logs / "other", somebody.pid, path))
        command = [sys.executable, "-c", ATTEMPTS % numbers, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT)
        somebody.kill()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (logs / "other").read_bytes() == b"other"


def test_log_of_a_killed_daemon_is_found_by_the_next_process(image: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    with Daemon(image, "--sandbox", f"--link-log={logs}") as daemon, FrontEnd(daemon.socket_path) as front_end:
        front_end.write(0, b"1" * 512)
        front_end.write(65536, b"2" * 512)
        daemon.kill()
    with qcow2.open(str(image), writable=True, log_directory=str(logs)) as disk:
        assert disk.read(0, 1024) == b"1" * 512 + b"b" * 512
        assert disk.read(65536, 1024) == b"2" * 512 + b"b" * 512
    assert not list(logs.iterdir())
    assert_not_corrupt(image)


def test_log_directories_do_not_pile_up(image: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    for _ in range(3):
        with Daemon(image, "--sandbox", f"--link-log={logs}") as daemon, FrontEnd(daemon.socket_path) as front_end:
            front_end.read(0, 512)
            daemon.kill()
    assert len(list(logs.iterdir())) == 1
    with Daemon(image, "--sandbox", f"--link-log={logs}") as daemon:
        use(daemon, b"1")
        daemon.stop()
    assert not list(logs.iterdir())


@pytest.mark.parametrize("options", [(), ("--read-only",), ("--cache=none",)])
def test_no_place_for_a_log_is_no_reason_to_end(base: Path, image: Path, options: tuple[str, ...]) -> None:
    with Daemon(image, "--sandbox", "--link-log=/nonexistent", *options) as daemon:
        with FrontEnd(daemon.socket_path) as front_end:
            assert front_end.read(0, 512) == b"b" * 512
            if "--read-only" not in options:
                front_end.write(0, b"1" * 512)
        daemon.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is kept from a file by nothing")
def test_image_of_another_user_is_served_by_root_all_the_same(image: Path) -> None:
    os.chown(image, 54321, 54321)
    image.chmod(0o600)
    with Daemon(image, "--sandbox") as daemon:
        use(daemon, b"1")
        use(daemon, b"2")
        daemon.process.send_signal(signal.SIGTERM)
        _, said = daemon.process.communicate(timeout=TIMEOUT)
    assert daemon.process.returncode == 0
    assert "CAP_DAC_OVERRIDE is kept" in said
    assert said.count("\n") <= 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a directory of another user")
def test_log_of_somebody_who_may_not_write_the_image_is_not_believed(image: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    (logs / "qcow2-links.planted").mkdir(parents=True)
    os.chown(logs / "qcow2-links.planted", 54321, 54321)
    with Daemon(image, f"--link-log={logs}") as daemon, FrontEnd(daemon.socket_path) as front_end:
        front_end.write(0, b"1" * 512)
        daemon.kill()
    (log,) = (path for path in logs.iterdir() if path.is_file())
    log.rename(logs / "qcow2-links.planted" / log.name)
    os.chown(logs / "qcow2-links.planted" / log.name, 54321, 54321)
    with pytest.raises(qcow2.ImageError, match="it is of user 54321, who may not write the image"):
        qcow2.open(str(image), writable=True, log_directory=str(logs))
