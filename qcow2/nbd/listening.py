"""Where clients come from: a Unix socket, TCP, or sockets that systemd listens on for us."""

import contextlib
import errno
import ipaddress
import os
import socket
import stat
from collections.abc import Iterator

FIRST_INHERITED = 3  # SD_LISTEN_FDS_START
BACKLOG = 128


def inherited() -> list[socket.socket]:
    """The listening sockets that systemd, or who does as it does, has given to this process; none if there are none."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = os.environ.pop("LISTEN_FDS", "0")
    del os.environ["LISTEN_PID"]
    found = []
    for fd in range(FIRST_INHERITED, FIRST_INHERITED + (int(count) if count.isdigit() else 0)):
        os.set_inheritable(fd, False)
        found.append(socket.socket(fileno=fd))
    return found


@contextlib.contextmanager
def listening_on_path(path: str) -> Iterator[socket.socket]:
    """A Unix socket at *path*, in place of one that nobody listens on any more; the path is removed at the end.

    Raises: OSError naming the path.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with listener:
        try:
            _remove_stale(path)
            listener.bind(path)
            listener.listen(BACKLOG)
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), path) from None
        identity = _identity(path)
        try:
            yield listener
        finally:
            if identity is not None and _identity(path) == identity:
                os.unlink(path)


@contextlib.contextmanager
def listening_on_port(address: str, port: int, *, is_open: bool) -> Iterator[list[socket.socket]]:
    """Sockets for each address that *address*, a name or a number, stands for.

    Raises: OSError naming it; EACCES if others than this host reach it, unless the disk *is_open* to them.
    """
    with contextlib.ExitStack() as stack:
        listeners = []
        try:
            places = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            if not is_open and not all(_is_loopback(str(place[0])) for *_, place in places):
                text = "others than this host reach it, without TLS: give --tls-creds, or --no-tls"
                raise PermissionError(errno.EACCES, text)
            for family, kind, protocol, _, place in places:
                listener = stack.enter_context(socket.socket(family, kind, protocol))
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listener.bind(place)
                listener.listen(BACKLOG)
                listeners.append(listener)
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), f"{address}:{port}") from None
        yield listeners


def _is_loopback(number: str) -> bool:
    return ipaddress.ip_address(number).is_loopback


def _remove_stale(path: str) -> None:
    """Remove the socket at *path* if nobody listens on it."""
    if _identity(path) is None:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except BlockingIOError:  # one that is too busy to accept is there
            pass


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISSOCK(found.st_mode) else None
