"""The control socket of a running daemon: what it answers, and what its clients cannot do to it."""

import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

import pytest

from tests.frontend import F_CONFIG_WCE, F_FLUSH, FrontEnd
from tests.oracle import assert_clean
from tests.program import DAEMON, TIMEOUT, Daemon, qcow2_tool_ok, run
from vhost import Control, ControlError
from vhost.client import GREETING_TIMEOUT
from vhost.controlcommands import AT_ONCE, Commands
from vhost.controlsocket import Control as ControlSocket
from vhost.endpoint import listen

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qcow2_tool_ok("create", path, "64M")
    return path


@pytest.fixture
def control(tmp_path: Path) -> Path:
    return tmp_path / "control"


@pytest.fixture
def daemon(image: Path, control: Path) -> Iterator[Daemon]:
    with Daemon(image, f"--control={control}") as daemon:
        with FrontEnd(daemon.socket_path):  # once it answers, the control socket is there
            pass
        yield daemon


def ctl(control: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(DAEMON, "ctl", f"--control={control}", *arguments)


def ask(control: Path, *arguments: str) -> Any:
    done = ctl(control, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout or "null")


def connect(control: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.connect(str(control))
    client.settimeout(TIMEOUT)
    return client


def test_greeting_says_version_and_commands(daemon: Daemon, control: Path) -> None:
    with connect(control) as client, client.makefile("rb") as lines:
        assert json.loads(lines.readline()) == {
            "vhost-user-qcow2": {
                "version": 1,
                "commands": [
                    "status",
                    "stats",
                    "metrics",
                    "resize",
                    "snapshot",
                    "snapshot-begin",
                    "snapshot-next",
                    "snapshot-cancel",
                    "snapshot-internal-list",
                    "snapshot-internal-create",
                    "snapshot-internal-delete",
                    "snapshot-internal-apply",
                    "bitmap-list",
                    "bitmap-change",
                    "export-start",
                    "export-stop",
                    "export-list",
                    "stream",
                    "commit",
                    "backup",
                    "mirror",
                    "job-list",
                    "job-pause",
                    "job-resume",
                    "job-complete",
                    "job-cancel",
                    "job-set-rate",
                    "flush",
                    "set-cache",
                    "quit",
                    "subscribe",
                ],
            }
        }


def test_only_our_user_may_connect(daemon: Daemon, control: Path) -> None:
    assert stat.S_IMODE(control.stat().st_mode) == 0o600


def test_status_names_image_and_front_end(daemon: Daemon, control: Path, image: Path) -> None:
    before = ask(control, "status")
    assert (before["image"], before["size"], before["cache"]) == (str(image), 64 * MIB, "writeback")
    assert (before["connected"], before["features"], before["running"]) == (False, None, False)
    with FrontEnd(daemon.socket_path) as front_end:
        during = ask(control, "status")
        assert (during["connected"], during["running"]) == (True, True)
        assert int(during["features"], 16) == front_end.features


def test_statistics_add_up_to_what_was_asked(daemon: Daemon, control: Path) -> None:
    with FrontEnd(daemon.socket_path, queues=2) as front_end:
        for i in range(40):
            front_end.write(i * MIB, bytes([i + 1]) * 4096)
            front_end.read(i * MIB, 8192)
        front_end.flush()
        stats = ask(control, "stats")
    counters, stages, queue = stats["counters"], stats["stages"], stats["queues"]["0"]
    assert (counters["reads"], counters["writes"], counters["flushes"]) == (40, 40, 1)
    assert (counters["read_bytes"], counters["written_bytes"]) == (40 * 8192, 40 * 4096)
    assert list(stats["queues"]) == ["0"]
    assert queue["requests"] == queue["service"]["count"] == 81
    assert 1 <= queue["wait"]["count"] <= 81
    assert stages["data"]["count"] >= 80
    assert stages["metadata"]["count"] >= 40  # each write allocated: its mapping was written
    assert stages["sync"]["count"] >= 1
    for stage in (*stages.values(), queue["wait"], queue["service"]):
        assert sum(stage["buckets"].values()) == stage["count"]
        assert stage["nanoseconds"] < 60e9 * stage["count"]


def test_metrics_are_open_metrics_text(daemon: Daemon, control: Path) -> None:
    with FrontEnd(daemon.socket_path) as front_end:
        front_end.write(0, bytes(512))
        text = ctl(control, "metrics").stdout
    assert text.endswith("\n# EOF\n")
    assert "vhost_user_qcow2_writes_total 1\n" in text
    assert 'vhost_user_qcow2_queue_service_seconds_bucket{queue="0",le="+Inf"} 1\n' in text
    for line in text.splitlines()[:-1]:
        assert line.startswith(("# TYPE vhost_user_qcow2_", "vhost_user_qcow2_"))
        assert line.startswith("#") or float(line.rsplit(" ", 1)[1]) >= 0


def test_resize_reaches_the_front_end(daemon: Daemon, control: Path, image: Path) -> None:
    with FrontEnd(daemon.socket_path) as front_end:
        assert ask(control, "resize", "80M") == {"size": 80 * MIB}
        assert front_end.size == 80 * MIB
        front_end.write(80 * MIB - 512, b"z" * 512)
    refused = ctl(control, "resize", "1M")
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    daemon.stop()
    assert_clean(image)


def test_writethrough_can_be_forced_and_left_to_the_guest_again(daemon: Daemon, control: Path) -> None:
    def syncs_of_a_write(front_end: FrontEnd) -> int:
        before = ask(control, "stats")["counters"]["syncs"]
        front_end.write(0, b"w" * 512)
        return int(ask(control, "stats")["counters"]["syncs"]) - before

    with FrontEnd(daemon.socket_path, features=F_FLUSH | F_CONFIG_WCE) as front_end:
        front_end.write(0, b"w" * 512)
        assert syncs_of_a_write(front_end) == 0
        ask(control, "set-cache", "writethrough")
        assert ask(control, "status")["cache"] == "writethrough"
        front_end.set_writeback(True)
        assert syncs_of_a_write(front_end) == 1
        ask(control, "set-cache", "writeback")
        assert syncs_of_a_write(front_end) == 0
        front_end.set_writeback(False)
        ask(control, "set-cache", "writeback")  # the guest was told that writes are stable: they stay so
        assert syncs_of_a_write(front_end) == 1


def test_forcing_writethrough_flushes_first(daemon: Daemon, control: Path) -> None:
    with FrontEnd(daemon.socket_path) as front_end:
        front_end.write(0, b"w" * 512)
        before = ask(control, "stats")["counters"]["syncs"]
        ask(control, "set-cache", "writethrough")
        assert ask(control, "stats")["counters"]["syncs"] == before + 1
        ask(control, "flush")
        assert ask(control, "stats")["counters"]["syncs"] == before + 2


def test_quit_is_a_clean_end(daemon: Daemon, control: Path, image: Path) -> None:
    ask(control, "quit")
    assert daemon.process.wait(TIMEOUT) == 0
    assert not control.exists()
    assert_clean(image)


GARBAGE = [
    b"\xff\xfe garbage\n",
    b"{}\n",
    b"[1]\n",
    b'{"command": 5}\n',
    b'{"command": "status", "more": 1}\n',
    b'{"command": "resize"}\n',
    b'{"command": "resize", "size": -1}\n',
    b'{"command": "resize", "size": true}\n',
    b'{"command": "resize", "size": 1e400}\n',
    b'{"command": "set-cache", "mode": ["writeback"]}\n',
    b'{"command": "export-start", "file": "\\ud800", "socket": "/s"}' + b"\n",
    b'{"command": "export-start", "file": "a", "socket": "/s", "certificates": "\\ud800"}' + b"\n",
    b'{"command": "export-start", "file": "a", "port": 1, "bitmaps": ["\\ud800"]}' + b"\n",
    b'{"command": "mirror", "target": "a\\u0000b"}' + b"\n",
    b'{"command": "status", "id": NaN}\n',
    b'{"command": "status", "id": -Infinity}\n',
    b'{"command": "status", "id": 1e400}\n',
    b"[" * 60000 + b"\n",
    b"9" * 60000 + b"\n",
]


@pytest.mark.parametrize("line", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_answered_with_an_error_and_the_client_goes_on(daemon: Daemon, control: Path, line: bytes) -> None:
    with connect(control) as client, client.makefile("rwb") as lines:
        lines.readline()
        lines.write(line + b'{"command": "status", "id": [7]}\n')
        lines.flush()
        assert list(json.loads(lines.readline())) == ["error"]
        assert json.loads(lines.readline())["id"] == [7]


def test_endless_line_ends_its_connection_only(daemon: Daemon, control: Path) -> None:
    with connect(control) as client:
        with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012 - until it happens
            while True:
                client.sendall(b"x" * 65536)
    assert ask(control, "status")["size"] == 64 * MIB


def test_client_that_reads_nothing_keeps_nobody_waiting(daemon: Daemon, control: Path) -> None:
    with connect(control) as greedy:
        greedy.setblocking(False)
        with pytest.raises(BlockingIOError):  # noqa: PT012 - until it happens
            while True:
                greedy.send(b'{"command": "stats"}\n' * 100)
        assert ask(control, "status")["size"] == 64 * MIB
        with FrontEnd(daemon.socket_path) as front_end:
            front_end.write(0, bytes(512))
            daemon.stop()


def test_clients_that_leave_in_the_middle_leave_nothing_behind(daemon: Daemon, control: Path) -> None:
    fds = f"/proc/{daemon.process.pid}/fd"
    ask(control, "status")
    before = len(os.listdir(fds))
    for i in range(50):
        with connect(control) as client:
            client.send(b'{"command": "status"}\n'[: i % 23])
    clients = [connect(control) for _ in range(20)]  # more than are served at once
    for client in clients:
        client.close()
    while len(os.listdir(fds)) > before:
        ask(control, "status")


def test_stale_control_socket_is_replaced_and_a_live_one_is_not(daemon: Daemon, control: Path, image: Path) -> None:
    daemon.process.send_signal(signal.SIGKILL)
    daemon.process.wait(TIMEOUT)
    assert control.exists()
    with Daemon(image, f"--control={control}") as second:
        with FrontEnd(second.socket_path):
            pass
        assert ask(control, "status")["image"] == str(image)
        command = [DAEMON, f"--blk-file={image}", f"--socket-path={control}.own", f"--control={control}"]
        third = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        assert third.returncode == 1
        assert "in use" in third.stderr
        second.stop()


def test_client_without_a_descriptor_for_it_is_served_once_there_is_one(daemon: Daemon, control: Path) -> None:
    pid = daemon.process.pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        stack.enter_context(FrontEnd(daemon.socket_path))  # the visit before it has closed its descriptors
        taken = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
        limit = next(number for number in range(soft) if number not in taken)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, hard))
        client = stack.enter_context(connect(control))
        lines = stack.enter_context(client.makefile("rb"))
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(1)
        client.settimeout(TIMEOUT)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        assert b"version" in lines.readline()


BROKEN = """
import socket, sys
from vhost.controlsocket import Control
from vhost.endpoint import listen

class Broken:
    def run(self, request, client):
        raise LookupError("a bug of ours")

client = socket.socket(socket.AF_UNIX)
with listen(sys.argv[1], at_once=False) as endpoint, Control(endpoint, Broken()):
    client.connect(sys.argv[1])
    client.send(b"{}\\n")
    client.recv(1 << 16), client.recv(1 << 16)
"""


class Busy:
    """Commands that take until they are let go."""

    def __init__(self) -> None:
        self.asked: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self.may_end = threading.Event()

    def run(self, request: dict[str, Any], client: object) -> str:
        if request.get("command") in AT_ONCE:
            return "at once"
        self.asked.put(request)
        assert self.may_end.wait(TIMEOUT)
        return "done"

    def leave(self, client: object) -> None:
        pass


@contextmanager
def at_work(control: Path) -> Iterator[tuple[Busy, socket.socket]]:
    """A control socket while the command of a client of its runs."""
    busy = Busy()
    with listen(str(control), at_once=False) as endpoint, ControlSocket(endpoint, cast("Commands", busy)):
        with ExitStack() as stack, connect(control) as first:
            stack.callback(busy.may_end.set)
            first.sendall(b"{}\n")
            assert busy.asked.get(timeout=TIMEOUT) == {}
            yield busy, first


def test_client_is_greeted_while_a_command_of_another_runs(control: Path) -> None:
    with at_work(control) as (busy, first), connect(control) as second:
        second.settimeout(GREETING_TIMEOUT)
        with first.makefile("rb") as answers, second.makefile("rb") as greetings, Control(control):
            assert b"version" in greetings.readline()
            assert b"version" in answers.readline()
            busy.may_end.set()
            assert json.loads(answers.readline()) == {"result": "done"}


def test_what_waits_for_nobody_is_answered_while_a_command_of_another_runs(control: Path) -> None:
    with at_work(control) as (busy, _), connect(control) as second, second.makefile("rb") as answers:
        second.settimeout(GREETING_TIMEOUT)
        for name in AT_ONCE:
            second.sendall(json.dumps({"command": name}).encode() + b"\n")
        second.sendall(b'{"command": "flush"}\n')
        assert b"version" in answers.readline()
        assert [json.loads(answers.readline())["result"] for _ in AT_ONCE] == ["at once"] * len(AT_ONCE)
        with connect(control) as third, third.makefile("rb") as others:
            third.settimeout(GREETING_TIMEOUT)
            third.sendall(b'{"command": "status"}\n')
            assert b"version" in others.readline()
            assert b"at once" in others.readline()
        assert busy.asked.empty()
        busy.may_end.set()
        assert busy.asked.get(timeout=TIMEOUT) == {"command": "flush"}
        assert b"done" in answers.readline()


def test_client_of_many_commands_lets_another_come_between(control: Path) -> None:
    with at_work(control) as (busy, first), ExitStack() as stack:
        others = [stack.enter_context(Control(control)) for _ in range(3)]
        for other in others:
            other.ask(AT_ONCE[0])  # it is greeted before it is among those who are read
        first.sendall(b'{"from": "first"}\n' * 20)
        for number, other in enumerate(others):
            other.send("flush", number=number)
        busy.may_end.set()
        asked = [busy.asked.get(timeout=TIMEOUT) for _ in range(23)]
        assert {request.get("number") for request in asked[:4]} >= {0, 1, 2}


def test_lines_that_come_together_are_answered_in_their_order(control: Path) -> None:
    with at_work(control) as (busy, first), first.makefile("rb") as answers:
        first.sendall(b'{"command": "status", "id": 1}\n{"id": 2}\n{"command": "status", "id": 3}\nrubbish\n')
        busy.may_end.set()
        told = [json.loads(answers.readline()) for _ in range(6)][1:]
        assert [each.get("id") for each in told] == [None, 1, 2, 3, None]
        assert [each.get("result") for each in told] == ["done", "at once", "done", "at once", None]


def test_one_client_too_many_is_told_so(daemon: Daemon, control: Path) -> None:
    with ExitStack() as stack:
        for _ in range(16):
            stack.enter_context(Control(control))
        with pytest.raises(ControlError, match="16 clients are connected"), Control(control):
            pass
        assert ctl(control, "status").stderr.count("16 clients are connected") == 1
    assert ask(control, "status")["size"] == 64 * MIB


def test_clients_that_have_left_take_nobodys_place(daemon: Daemon, control: Path) -> None:
    with ExitStack() as stack:
        for _ in range(15):
            stack.enter_context(Control(control))
        for _ in range(400):
            with Control(control):
                pass


def test_one_client_too_many_is_let_in_where_another_leaves(daemon: Daemon, control: Path) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(Control(control)) for _ in range(16)]
        with connect(control) as one_more, one_more.makefile("rb") as lines:
            clients[5].__exit__()
            assert b"version" in lines.readline()


def test_clients_that_have_left_while_a_command_runs_take_nobodys_place(control: Path) -> None:
    with at_work(control):
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(100):
            with Control(control):
                pass
        assert len(os.listdir("/proc/self/fd")) - before <= 16


def test_client_that_has_left_keeps_its_place_until_its_command_is_run(control: Path) -> None:
    with at_work(control) as (busy, _):
        for number in range(15):
            with Control(control) as client:
                client.send("flush", number=number)
        with pytest.raises(ControlError, match="16 clients are connected"), Control(control):
            pass
        busy.may_end.set()
        numbers = [busy.asked.get(timeout=TIMEOUT)["number"] for _ in range(15)]
        assert sorted(numbers) == [*range(15)]


def test_who_hangs_up_is_no_daemon_of_ours(control: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(control))
        listener.listen()
        hangup = threading.Thread(target=lambda: listener.accept()[0].close())
        hangup.start()
        with pytest.raises(ControlError, match="no daemon of ours answers there"), Control(control):
            pass
        hangup.join()


def test_a_bug_of_ours_ends_the_process(control: Path) -> None:
    command = [sys.executable, "-c", BROKEN, control]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == os.EX_SOFTWARE
    assert "LookupError: a bug of ours" in done.stderr


@pytest.mark.parametrize("size", ["9223372036854775807", "9223372036854775296", "18446744073709551616", "-1", "1e400"])
def test_number_that_is_no_size_is_refused(daemon: Daemon, control: Path, size: str) -> None:
    with connect(control) as client, client.makefile("rwb") as lines:
        lines.readline()
        lines.write(b'{"command": "resize", "size": ' + size.encode() + b"}\n")
        lines.flush()
        assert "error" in json.loads(lines.readline())
    assert ask(control, "status")["size"] == 64 * MIB


@pytest.mark.parametrize("answers", [b"", b"hi\n", b"{}\n[]\n", b"{}\n{}\n", b"\xff\n"])
def test_ctl_names_a_socket_at_which_no_daemon_answers(control: Path, answers: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, _start_ctl(control, listener) as program:
        with listener.accept()[0] as client:
            client.sendall(answers)
            client.shutdown(socket.SHUT_WR)
            _, complaint = program.communicate(timeout=TIMEOUT)
    assert program.returncode == 1
    assert complaint.count("\n") == 1
    assert str(control) in complaint


def test_ctl_gives_up_on_a_socket_that_does_not_greet(control: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, _start_ctl(control, listener) as program:
        _, complaint = program.communicate(timeout=TIMEOUT)
    assert program.returncode == 1
    assert (complaint.count("\n"), str(control) in complaint) == (1, True)
    assert (complaint.count("\n"), f"{control}: whoever listens there has not greeted us" in complaint) == (1, True)


@pytest.mark.parametrize("place", range(3))
def test_ctl_takes_its_socket_anywhere(daemon: Daemon, control: Path, place: int) -> None:
    words = ["resize", "128M"]
    words[place:place] = ["--control", str(control)]
    done = run(DAEMON, "ctl", *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert ask(control, "status")["size"] == 128 * MIB


@pytest.mark.parametrize("words", [["status"], ["resize", "1M"], ["--control"], []])
def test_ctl_without_a_socket_is_told_of_it(words: list[str]) -> None:
    done = run(DAEMON, "ctl", *words)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "--control" in done.stderr or "COMMAND" in done.stderr


def test_ctl_names_a_socket_that_is_not_there(control: Path) -> None:
    assert ctl(control, "status").stderr == f"vhost-user-qcow2: ctl: {control}: No such file or directory\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctl_dies_of_a_signal_without_a_word(control: Path, number: signal.Signals) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, _start_ctl(control, listener) as program:
        with listener.accept()[0] as client, client.makefile("rb") as requests:
            client.sendall(b"{}\n")
            requests.readline()
            program.send_signal(number)
            assert program.communicate(timeout=TIMEOUT) == ("", "")
    assert program.returncode == -number


PRINTING = [
    ["--stats", "--version"],
    ["--help"],
    ["--print-capabilities"],
    ["ctl", "--help"],
    ["ctl", "resize", "--help"],
    ["libvirt-xml", "--help"],
    ["libvirt-xml", "--socket-path=/s", "--blk-file=/i"],
]
UNBUFFERED = {"": {}, "unbuffered": {"PYTHONUNBUFFERED": "1"}}  # what fails is the flush, or the write


@pytest.mark.parametrize("mode", UNBUFFERED)
@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_full_standard_output_is_said_on_one_line(arguments: list[str], mode: str) -> None:
    environment = {**os.environ, **UNBUFFERED[mode]}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [DAEMON, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT, env=environment
        )
    assert done.returncode == 1
    assert done.stderr == "vhost-user-qcow2: standard output: No space left on device\n"


@pytest.mark.parametrize("mode", UNBUFFERED)
@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_program_whose_output_nobody_reads_dies_of_it_without_a_word(arguments: list[str], mode: str) -> None:
    environment = {**os.environ, **UNBUFFERED[mode]}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [DAEMON, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT, env=environment
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")


def _start_ctl(control: Path, listener: socket.socket) -> subprocess.Popen[str]:
    listener.bind(str(control))
    listener.listen()
    command = [DAEMON, "ctl", f"--control={control}", "status"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
