"""A daemon that was told to stop finishes what it has begun, and refuses who comes meanwhile."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import qcow2
from qcow2.lock import OURS
from tests.file.test_direct import lock, wait_for_line
from tests.frontend import IN, OK, FrontEnd
from tests.patience import TIMEOUT
from tests.program import Daemon
from vhost.daemon import run
from vhost.endpoint import listen
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
    program = "from vhost.together import Steps; Steps(lambda name, pace: {}[name], 'frozen').begin()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, "KeyError" in done.stderr) == (70, True)
