"""Where front-ends come from: a socket path of our own, or a file descriptor we inherited."""

import contextlib
import errno
import logging
import os
import select
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass

PATH_MAX = 107  # sun_path without its final NUL


RETRY_MILLISECONDS = 100

log = logging.getLogger("vhost")


class EndpointError(Exception):
    """The socket cannot be used; one line says why."""


class Door:
    """Where visitors are let in: a listening socket of which somebody waits for being readable."""

    def __init__(self, listener: socket.socket, stop_fd: int) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._stop_fd = stop_fd
        self._is_shut = False

    def open(self) -> socket.socket | None:
        """Let a visitor in; None if it has left, or if we lack a descriptor, memory or a right for it.

        Then who knocks goes on waiting. We say so, once, and wait a little, or our caller would spin.
        """
        try:
            visitor, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        except OSError as error:
            if not self._is_shut:
                log.warning("nobody can be let in for now: %s", error.strerror)
            self._is_shut = True
            is_stopping(self._stop_fd, RETRY_MILLISECONDS)
            return None
        self._is_shut = False
        return visitor


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A socket that front-ends may come to, or already connected to the one it will ever have."""

    unix_socket: socket.socket
    is_listening: bool
    path: str | None = None  # of a socket of our own, which does not listen yet
    identity: tuple[int, int] | None = None  # of that path

    def begin(self, backlog: int = 1, *, may_be_gone: bool = False) -> None:
        """Let visitors come; until now they were refused, which front-ends take better than an end in the greeting.

        If it *may_be_gone*, we say of a path that is removed by now that nobody can come.
        Raises: EndpointError if the path is another's by now, or is removed.
        """
        if self.path is None:
            return
        if may_be_gone and not os.path.lexists(self.path):
            log.warning("socket %s is gone: nobody can come to it", self.path)
        elif self.identity is None or _identity(self.path) != self.identity:
            raise EndpointError(f"socket {self.path} is gone, or another process has put its own there")
        self.unix_socket.listen(backlog)

    def visitors(self, stop_fd: int) -> Iterator[socket.socket]:
        """Yield one front-end's socket after the other, each the caller's to close, until *stop_fd* is readable."""
        if not self.is_listening:
            yield self.unix_socket
            return
        door = Door(self.unix_socket, stop_fd)
        while is_readable(self.unix_socket.fileno(), stop_fd):
            visitor = door.open()
            if visitor is None:
                continue
            yield visitor
            if self.unix_socket.fileno() < 0:
                return

    def refuse(self) -> None:
        """Take no more visitors: who comes now is refused at once."""
        if self.is_listening:
            self.unix_socket.close()


def is_stopping(stop_fd: int, milliseconds: int = 0) -> bool:
    """Whether a signal has asked us to end, or does so within *milliseconds*."""
    ready = select.poll()
    ready.register(stop_fd, select.POLLIN)
    return bool(ready.poll(milliseconds))


def is_readable(fd: int, stop_fd: int) -> bool:
    """Wait for *fd*; False if *stop_fd* came first or with it."""
    ready = select.poll()
    ready.register(fd, select.POLLIN)
    ready.register(stop_fd, select.POLLIN)
    return all(number != stop_fd for number, _ in ready.poll())


@contextlib.contextmanager
def listen(path: str, *, mode: int | None = None, group: int | None = None, at_once: bool = True) -> Iterator[Endpoint]:
    """Listen on *path*, in place of a socket that no process has any more; the path is removed at the end.

    Who may write to it by *mode* may connect; without one the umask decides. *group* is a number.
    If not *at_once*, only the path is taken, until `begin`.
    Raises: EndpointError if the path is too long, in use, or not a socket, or the group is not ours to give.
    """
    check_path(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        _remove_stale(path)
        _bind(listener, path, mode)
        identity = _identity(path)
        endpoint = Endpoint(listener, is_listening=True, path=path, identity=identity)
        try:
            if group is not None:
                _give(path, group)
            if at_once:
                endpoint.begin()
            yield endpoint
        finally:
            _remove_own(path, identity)


def _bind(listener: socket.socket, path: str, mode: int | None) -> None:
    """Make the socket with *mode* at once, by the umask: at no time may more visitors come."""
    before = os.umask(0o777 ^ mode) if mode is not None else None
    try:
        listener.bind(path)
    except OSError as error:
        raise EndpointError(f"cannot create socket {path}: {error.strerror}") from None
    finally:
        if before is not None:
            os.umask(before)


def _give(path: str, group: int) -> None:
    try:
        os.chown(path, -1, group, follow_symlinks=False)
    except OSError as error:
        raise EndpointError(f"cannot give socket {path} to group {group}: {error.strerror}") from None


def check_path(path: str) -> None:
    """Refuse a path that cannot be the address of a Unix socket."""
    length = len(os.fsencode(path))
    if not 0 < length <= PATH_MAX:
        raise EndpointError(f"socket path {path!r} has {length} bytes, a Unix socket takes 1 to {PATH_MAX}")


def _remove_own(path: str, identity: tuple[int, int] | None) -> None:
    """Remove the socket at *path*, unless it is someone else's by now; nobody is hurt by one that stays."""
    try:
        if _identity(path) == identity:
            os.unlink(path)
    except OSError as error:
        log.warning("the socket %s stays: %s", path, error.strerror)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISSOCK(found.st_mode) else None


def _remove_stale(path: str) -> None:
    """Remove the socket at *path* if no process has it."""
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise EndpointError(f"cannot look at {path}: {error.strerror}") from None
    if not stat.S_ISSOCK(kind):
        raise EndpointError(f"{path} exists and is not a socket")
    if _is_live(path):
        raise EndpointError(f"socket {path} is in use by another process")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _is_live(path: str) -> bool:
    """Whether a process has the socket at *path*, which need not listen yet: it is of the wrong type (EPROTOTYPE).

    A stream would be refused by a socket that does not listen as by one that is left over.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        return probe.connect_ex(path) not in (errno.ECONNREFUSED, errno.ENOENT)


@contextlib.contextmanager
def inherit(fd: int) -> Iterator[Endpoint]:
    """Use the Unix stream socket *fd*, listening or connected.

    Raises: EndpointError if it is not one.
    """
    try:
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError as error:
        raise EndpointError(f"file descriptor {fd}: {error.strerror}") from None
    if not is_socket:
        raise EndpointError(f"file descriptor {fd} is not a socket")
    with socket.socket(fileno=fd) as inherited:
        if (inherited.family, inherited.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            raise EndpointError(f"file descriptor {fd} is not a Unix stream socket")
        yield Endpoint(inherited, bool(inherited.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)))
