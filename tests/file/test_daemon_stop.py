"""A daemon that was told to stop finishes what it has begun, and refuses who comes meanwhile."""

import contextlib
import os
import socket
import threading
import time
from pathlib import Path

from tests.frontend import IN, OK, FrontEnd
from tests.patience import TIMEOUT
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
