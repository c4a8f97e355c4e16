"""A daemon that was told to stop finishes what it has begun, and refuses who comes meanwhile."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qcow2
from qcow2.lock import OURS
from tests.file.test_direct import lock, wait_for_line
from tests.frontend import IN, OK, FrontEnd
from tests.listening import visit
from tests.patience import TIMEOUT
from tests.program import DAEMON, Daemon
from vhost import Control
from vhost.daemon import run
from vhost.endpoint import listen
from vhost.together import PATIENCE_SECONDS
from virtio.block import BlockDevice, DeviceBackend


class SlowDevice(BlockDevice):
    """Its reads last until they are let go."""

    size = 1 << 20

    def __init__(self) -> None:
        self.entered, self.let_go = threading.Event(), threading.Event()

    def read(self, offset: int, nbytes: int) -> bytes:
        self.entered.set()
        assert self.let_go.wait(TIMEOUT)
        return bytes(nbytes)


def is_refused(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as visitor:
        try:
            visitor.connect(str(path))
        except ConnectionRefusedError:
            return True
    return False


def test_visitors_are_refused_while_the_last_request_is_finished(tmp_path: Path) -> None:
    device, path = SlowDevice(), tmp_path / "socket"
    with contextlib.ExitStack() as stack:
        stop_fd = os.eventfd(0)
        stack.callback(os.close, stop_fd)
        endpoint = stack.enter_context(listen(str(path)))
        daemon = threading.Thread(
            target=lambda: run(DeviceBackend(device), endpoint, stop_fd, num_queues=1, writeback=True)
        )
        daemon.start()
        stack.callback(daemon.join)
        stack.callback(device.let_go.set)
        guest = stack.enter_context(FrontEnd(path))
        guest.submit(IN, 0, nbytes=512)
        assert device.entered.wait(TIMEOUT)
        os.eventfd_write(stop_fd, 1)
        deadline = time.monotonic() + TIMEOUT
        while not is_refused(path):
            assert time.monotonic() < deadline
        assert not guest.reap()
        device.let_go.set()
        daemon.join()
        assert [done.status for done in guest.reap()] == [OK]


@pytest.mark.parametrize(
    ("waits_for", "request_"),
    [
        ("disk", {"command": "resize", "size": 2 << 20}),
        ("disk", {"command": "snapshot-begin", "name": "frozen"}),
        ("disk", {"command": "bitmap-list"}),
        ("copy", {"command": "mirror", "target": "copy", "existing": True}),
    ],
)
def test_a_command_that_opens_an_image_does_not_keep_the_daemon(
    tmp_path: Path, waits_for: str, request_: dict[str, Any]
) -> None:
    """What it waits for would come to no end here: a dead process's transfers, which are an open descriptor."""
    image = tmp_path / "disk"
    for name in ("disk", "copy"):
        qcow2.create(tmp_path / name, 1 << 20)
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(Daemon(image, f"--control={image}.control"))
        guest = stack.enter_context(FrontEnd(daemon.socket_path))
        if waits_for == "disk":
            guest.stop_queue()  # the image is let go
        fd = os.open(tmp_path / waits_for, os.O_RDWR)
        stack.callback(os.close, fd)
        for byte in (OURS, 101, 201):
            lock(fd, byte)
        client = stack.enter_context(socket.socket(socket.AF_UNIX))
        client.connect(f"{image}.control")
        client.sendall(json.dumps(request_).encode() + b"\n")
        wait_for_line(daemon, "waiting for the last transfers of a process that died")
        daemon.stop()
        assert daemon.process.stderr is not None
        assert "Traceback" not in daemon.process.stderr.read()


def test_a_snapshot_whose_thread_fails_ends_the_process() -> None:
    """A bug of ours on it: who waits for its next step would wait for ever."""
    program = "from vhost.together import Steps; Steps(lambda name, pace: {}[name], 'frozen', -1).begin()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, "KeyError" in done.stderr) == (70, True)


def test_a_snapshot_that_waits_for_its_client_is_called_off(tmp_path: Path) -> None:
    """Its guest waits, too, and would have for ten seconds."""
    image = tmp_path / "disk"
    qcow2.create(image, 1 << 20)
    with Daemon(image, f"--control={image}.control") as daemon:
        with FrontEnd(daemon.socket_path), Control(f"{image}.control") as client:
            client.ask("snapshot-begin", name="frozen")
            client.ask("snapshot-next")
            asked = time.monotonic()
            daemon.stop()
            assert time.monotonic() - asked < PATIENCE_SECONDS / 2
    assert not (tmp_path / "frozen").exists()


@pytest.mark.parametrize("option", ["--key-fd", "--key-file"])
def test_a_key_that_does_not_come_is_waited_for_until_a_signal(tmp_path: Path, option: str) -> None:
    key, socket_path = tmp_path / "key", tmp_path / "socket"
    os.mkfifo(key)
    with contextlib.ExitStack() as stack:
        both = os.open(key, os.O_RDWR)
        stack.callback(os.close, both)
        value = both if option == "--key-fd" else key
        command = [DAEMON, f"--socket-path={socket_path}", f"--blk-file={tmp_path}/disk", f"{option}={value}"]
        process = stack.enter_context(subprocess.Popen(command, pass_fds=[both], stderr=subprocess.PIPE, text=True))
        stack.callback(process.kill)
        os.write(both, b"half a k")
        while select.select([both], [], [], 0)[0]:  # until it has that half
            assert process.poll() is None
        process.terminate()
        _, said = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, said) == (0, "")


def fill(path: Path, stack: contextlib.ExitStack) -> None:
    """Send until there is no room at *path*, whoever sends."""
    sent = 1
    while sent:
        sender = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        sender.connect(str(path))
        sender.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                sent += sender.send(b"x")


@contextlib.contextmanager
def told(tmp_path: Path, *options: str) -> Iterator[tuple["subprocess.Popen[str]", socket.socket]]:
    """A daemon at *tmp_path*/socket, and its service manager, which has no room for what it is told."""
    qcow2.create(tmp_path / "disk", 1 << 20)
    notify = tmp_path / "notify"
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        manager.settimeout(TIMEOUT)
        manager.bind(str(notify))
        fill(notify, stack)
        command = [DAEMON, f"--socket-path={tmp_path}/socket", f"--blk-file={tmp_path}/disk", *options]
        environment = {**os.environ, "NOTIFY_SOCKET": str(notify)}
        process = stack.enter_context(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        stack.callback(process.kill)
        yield process, manager


def hear(manager: socket.socket) -> bytes:
    """The next that a daemon tells it."""
    while (heard := manager.recv(100)) == b"x":
        pass
    return heard


@pytest.mark.parametrize("options", [(), ("--sandbox",)])
def test_a_service_manager_that_is_slow_hears_all_the_same(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Or it would end us, who serve a guest, as one that never was ready."""
    with told(tmp_path, *options) as (process, manager):
        with visit(process, tmp_path / "socket") as guest:
            assert guest.read(0, 512) == bytes(512)  # which waits for no manager
            assert hear(manager) == b"READY=1"
        process.terminate()
        assert hear(manager) == b"STOPPING=1"
        process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0


def test_a_service_manager_that_reads_nothing_keeps_nobody_waiting(tmp_path: Path) -> None:
    with told(tmp_path) as (process, _):
        with visit(process, tmp_path / "socket") as guest:
            assert guest.read(0, 512) == bytes(512)
        process.terminate()
        _, said = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0
    assert "the service manager is not told" in said


EARLY = """
import os, signal, sys
class Interrupting:
    def find_spec(self, name, path, target=None):
        if name == "vhost.endpoint":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
from vhost.command import main
sys.exit(main())
"""


def test_an_interrupt_before_anything_has_begun_ends_without_a_word(tmp_path: Path) -> None:
    command = [sys.executable, "-c", EARLY, f"--socket-path={tmp_path}/socket", f"--blk-file={tmp_path}/disk"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


HEARD = """
import select, signal, sys
from ring.thread import start_deaf
from threading import Thread
from vhost.signals import stop_signals
def end():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    signal.raise_signal(signal.SIGTERM)
with stop_signals() as stop_fd:
    poll = select.poll()
    poll.register(stop_fd, select.POLLIN)
    start_deaf(Thread(target=end))
    sys.exit(not poll.poll(30_000))
"""


def test_a_signal_is_heard_that_another_thread_gets() -> None:
    """Python would run its handler once the poll has returned; so it does with one that comes right before the poll."""
    done = subprocess.run([sys.executable, "-c", HEARD], timeout=TIMEOUT, check=False)
    assert done.returncode == 0


ELSEWHERE = """
import os, signal
from threading import Thread
from vhost.signals import stop_signals
def use():
    try:
        with stop_signals():
            pass
    except ValueError:
        print("refused", flush=True)
thread = Thread(target=use)
thread.start()
thread.join()
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_signals_that_only_the_main_thread_may_ask_for_stay_as_they_were() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "refused\n")
