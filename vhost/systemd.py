"""Socket activation and notification of systemd, as sd_listen_fds(3) and sd_notify(3) describe them."""

import logging
import os
import select
import socket
from collections.abc import Callable

FIRST_FD = 3  # SD_LISTEN_FDS_START
PATIENCE_MILLISECONDS = 1000  # a guest waits, and who wants us to end

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
        address = os.environ.get("NOTIFY_SOCKET")
        if address is not None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._try(lambda told: told.connect("\0" + address[1:] if address.startswith("@") else address))
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._socket is not None:
            self._socket.close()

    def tell(self, state: str) -> None:
        """Tell it *state*, if it listens; not one that does not read what it is told."""
        self._try(lambda told: _send(told, state.encode()))

    def _try(self, what: Callable[[socket.socket], object]) -> None:
        if self._socket is None:
            return
        try:
            what(self._socket)
        except OSError as error:
            log.warning("the service manager is not told: NOTIFY_SOCKET: %s", error.strerror)
            self._socket.close()
            self._socket = None


def _send(told: socket.socket, state: bytes) -> None:
    """Raises: OSError, also if there is no room for *state*."""
    room = select.poll()
    room.register(told, select.POLLOUT)
    room.poll(PATIENCE_MILLISECONDS)
    told.send(state, socket.MSG_DONTWAIT)
