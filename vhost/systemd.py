"""Socket activation and notification of systemd, as sd_listen_fds(3) and sd_notify(3) describe them."""

import contextlib
import logging
import os
import select
import socket
import threading
from collections.abc import Callable

from ring.thread import start_deaf

FIRST_FD = 3  # SD_LISTEN_FDS_START
PATIENCE_MILLISECONDS = 1000  # who wants us to end waits
READY = b"READY=1"

log = logging.getLogger("vhost")


def activated_fd() -> int | None:
    """The socket that we were started with, if it was meant for us; what names it leaves the environment.

    Raises: ValueError if there are several.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit() or int(count) == 0:
        return None
    if int(count) > 1:
        raise ValueError(f"systemd passed {count} sockets, one is enough")
    os.set_inheritable(FIRST_FD, False)
    return FIRST_FD


class ServiceManager:
    """Whoever started us and wants to know how we are, if somebody does; a context manager.

    The socket is connected before a sandbox could forbid that. A manager that cannot be told is no reason to end: we
    say so.
    """

    def __enter__(self) -> "ServiceManager":
        self._socket: socket.socket | None = None
        self._waiting: threading.Thread | None = None  # until it has ended, the socket is its own
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC)  # readable: it is to end
        address = os.environ.get("NOTIFY_SOCKET")
        if address is not None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._try(lambda told: told.connect("\0" + address[1:] if address.startswith("@") else address))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop_waiting()
        os.close(self._stop_fd)
        if self._socket is not None:
            self._socket.close()

    def tell_ready(self) -> None:
        """Tell it that we serve. It may take its time until it has room for that, and nobody waits for it."""
        self._try(self._begin_ready)

    def tell_stopping(self) -> None:
        """Tell it that we end, if it has room for that within a second."""
        self._stop_waiting()
        self._try(_send_stopping)

    def _begin_ready(self, told: socket.socket) -> None:
        try:
            told.send(READY, socket.MSG_DONTWAIT)
        except BlockingIOError:
            waiting = threading.Thread(target=self._main, name="ready", daemon=True)
            start_deaf(waiting)
            self._waiting = waiting

    def _main(self) -> None:
        try:
            self._try(self._send_ready)
        except BaseException as error:  # a bug of ours
            from vhost.device import die  # late: who only asks for our options needs no device

            die(error)

    def _send_ready(self, told: socket.socket) -> None:
        ready = select.poll()
        ready.register(told, select.POLLOUT)
        ready.register(self._stop_fd, select.POLLIN)
        while all(fd != self._stop_fd for fd, _ in ready.poll()):
            with contextlib.suppress(BlockingIOError):  # another took the room
                told.send(READY, socket.MSG_DONTWAIT)
                return

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            os.eventfd_write(self._stop_fd, 1)
            self._waiting.join()
            self._waiting = None

    def _try(self, what: Callable[[socket.socket], object]) -> None:
        if self._socket is None:
            return
        try:
            what(self._socket)
        except OSError as error:
            log.warning("the service manager is not told: NOTIFY_SOCKET: %s", error.strerror)
            self._socket.close()
            self._socket = None


def _send_stopping(told: socket.socket) -> None:
    """Raises: OSError, also if there is no room for it."""
    room = select.poll()
    room.register(told, select.POLLOUT)
    room.poll(PATIENCE_MILLISECONDS)
    told.send(b"STOPPING=1", socket.MSG_DONTWAIT)
