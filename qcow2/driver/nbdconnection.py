"""One connection to an NBD server, by libnbd, on a thread of its own: whoever asks may wait for the answer, or not.

The thread alone touches libnbd's handle, and sleeps in poll: a server that hangs keeps nobody who does not want to be
kept. What was asked for on a connection that is gone may have been done or not; there is no other one after it.
"""

import errno
import os
import re
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qcow2.driver.thread import start_quiet
from qcow2.error import UnsupportedImage

CONNECT_SECONDS = 10.0  # for all of it, until the export is known
DEAD_SECONDS = 30  # until a host that answers no packet is given up
PATIENCE_FACTOR = 6  # of one request, while others are answered; and of a FLUSH
TICK_SECONDS = 1.0  # between two looks whether patience has come to its end
LINE_FREES = 1.0  # seconds that saying goodbye may take

Completion = Callable[[Any], int]  # takes what libnbd gives: an object whose `value` is an errno or 0


def load_library(uri: str) -> Any:
    """libnbd's Python binding. Raises: UnsupportedImage if it is not installed."""
    try:
        import nbd  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        nbd = None
    if not hasattr(nbd, "NBD"):  # PyPI has another package of that name
        raise UnsupportedImage(uri, "NBD needs libnbd's Python binding: install python3-libnbd, as in docs/nbd.md")
    return nbd


@dataclass(slots=True, eq=False)
class Command:
    """One request: *issue(handle, completion)* hands it to libnbd, *end(error)* is told once when it has ended."""

    issue: Callable[[Any, Completion], object]
    end: Callable[[BaseException | None], None]
    is_flush: bool = False
    since: float = field(default_factory=time.monotonic)


class NbdConnection:
    """The connection to *uri*.

    *on_lost(error)* is told, on the connection's thread, when it is gone and nobody has closed it.
    """

    def __init__(self, uri: str, *, patience: float | None = None) -> None:
        """With *patience* a server that answers nothing for so many seconds is lost.

        Raises: UnsupportedImage without libnbd.
        """
        self.on_lost: Callable[[OSError], None] = lambda error: None
        self._nbd = load_library(uri)
        self._uri = uri
        self._patience = patience
        self._lock = threading.RLock()  # a signal may come where this very thread has it, and give up
        self._error: BaseException | None = None  # once it is gone
        self._new: deque[Command] = deque()
        self._is_closing = False
        self._wake = -1  # what the thread sleeps on besides the line, while there is one
        self._settled = threading.Event()  # connected, or gone
        self._thread: threading.Thread | None = None
        # the thread's
        self._under_way: set[Command] = set()
        self._ended: list[tuple[Command, int]] = []
        self._moved = 0.0  # when something was answered last

    # any thread

    def open(self, learn: Callable[[Any], None]) -> None:
        """Connect; *learn(handle)* is called on the connection's thread once the export is known.

        Raises: OSError, and whatever *learn* raises.
        """
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        thread = threading.Thread(target=self._main, args=(learn,), name="nbd", daemon=True)
        try:
            start_quiet(thread)
        except RuntimeError as error:  # a limit
            self._error = OSError(errno.EAGAIN, str(error), self._uri)
            self._forget_wake()
            raise self._error from None
        self._thread = thread
        if not self._settled.wait(2 * CONNECT_SECONDS):  # a resolver that knows no end of waiting
            self.abort()
            raise self._timed_out("cannot be found", 2 * CONNECT_SECONDS)
        if self._error is not None:
            raise _anew(self._error)

    @property
    def is_lost(self) -> bool:
        """Whether nothing can be asked any more."""
        return self._error is not None

    def begin(self, command: Command) -> None:
        """Have *command* done beside those that are under way; never waits."""
        with self._lock:
            error = self._error
            if error is None:
                self._new.append(command)
                self._stir()
        if error is not None:
            command.end(_anew(error))

    def abort(self) -> None:
        """Let it be gone as soon as can be, whatever is under way; does not wait, a second time does nothing."""
        with self._lock:
            self._is_closing = True
            self._stir()

    def close(self) -> None:
        """Let it be gone, and return when its thread has ended; a second time does nothing."""
        self.abort()
        if self._thread is not None and self._settled.is_set():  # else it is with the resolver, and ends after that
            self._thread.join()

    # with the lock

    def _stir(self) -> None:
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def _forget_wake(self) -> None:
        os.close(self._wake)
        self._wake = -1

    # the thread

    def _main(self, learn: Callable[[Any], None]) -> None:
        self._end_all(self._live(learn))

    def _live(self, learn: Callable[[Any], None]) -> BaseException:
        """From the connection's begin to its end -> why it has ended; nothing refers to the handle any more then."""
        handle = self._nbd.NBD()
        try:
            self._connect(handle)
            learn(handle)
            self._settled.set()
            self._serve(handle)
            self._say_goodbye(handle)
        except self._nbd.Error as error:
            return self._as_os_error(error)
        except MemoryError:
            return OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), self._uri)
        except BaseException as error:  # belongs to who waits
            return error.with_traceback(None)
        return self._given_up()

    def _connect(self, handle: Any) -> None:
        """Raises: OSError, Error."""
        late = time.monotonic() + CONNECT_SECONDS
        handle.set_uri_allow_local_file(True)  # the operator's own: where his certificates are
        handle.add_meta_context(self._nbd.CONTEXT_BASE_ALLOCATION)
        handle.aio_connect_uri(self._uri)
        while not handle.aio_is_ready():
            if self._is_closing:
                raise self._given_up()
            if time.monotonic() >= late:
                raise self._timed_out("does not greet", CONNECT_SECONDS)
            self._turn(handle, TICK_SECONDS)
        self._watch_over(handle.aio_get_fd())

    def _watch_over(self, fd: int) -> None:
        """Let the kernel tell when the other host is gone; of a Unix socket it does so anyway."""
        with socket.socket(fileno=os.dup(fd)) as line:
            if line.family in (socket.AF_INET, socket.AF_INET6):
                line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, DEAD_SECONDS // 3)
                line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, DEAD_SECONDS // 6)
                line.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_SECONDS * 1000)

    def _serve(self, handle: Any) -> None:
        """Raises: OSError, Error."""
        while not self._is_closing:
            for command in self._taken():
                self._issue(handle, command)
            self._end_some()
            self._require_patience()
            is_timed = self._patience is not None and self._under_way
            self._turn(handle, min(TICK_SECONDS, self._patience or 0.0) if is_timed else None)
            self._end_some()

    def _taken(self) -> list[Command]:
        """What has been asked for since; it is under way, whatever happens to those before it."""
        with self._lock:
            taken = [*self._new]
            self._under_way.update(taken)
            self._new.clear()
        return taken

    def _issue(self, handle: Any, command: Command) -> None:
        def completed(error: Any) -> int:
            self._ended.append((command, int(error.value)))
            return 1  # libnbd forgets it

        try:
            command.issue(handle, completed)
        except self._nbd.Error as error:  # libnbd knows that it cannot be
            self._under_way.discard(command)
            command.end(self._as_os_error(error))

    def _end_some(self) -> None:
        ended, self._ended = self._ended, []
        for command, number in ended:
            self._moved = time.monotonic()
            if command in self._under_way:
                self._under_way.remove(command)
                command.end(OSError(number, os.strerror(number), self._uri) if number else None)

    def _require_patience(self) -> None:
        """Raises: OSError once the server has kept somebody waiting for too long."""
        if self._patience is None:
            return
        now = time.monotonic()
        quick = min((command.since for command in self._under_way if not command.is_flush), default=now)
        if now - max(quick, self._moved) >= self._patience:
            raise self._timed_out("answers nothing", self._patience)
        oldest = min((command.since for command in self._under_way), default=now)
        if now - oldest >= PATIENCE_FACTOR * self._patience:
            raise self._timed_out("leaves a request unanswered", PATIENCE_FACTOR * self._patience)

    def _turn(self, handle: Any, seconds: float | None) -> None:
        """Sleep until the line or somebody has something for us, *seconds* at most. Raises: Error."""
        fd, direction = handle.aio_get_fd(), handle.aio_get_direction()
        wants_in, wants_out = direction & self._nbd.AIO_DIRECTION_READ, direction & self._nbd.AIO_DIRECTION_WRITE
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        poller.register(fd, (select.POLLIN if wants_in else 0) | (select.POLLOUT if wants_out else 0))
        for ready, events in poller.poll(None if seconds is None else seconds * 1000):
            if ready == self._wake:
                os.eventfd_read(self._wake)
            elif wants_in and events & ~select.POLLOUT:
                handle.aio_notify_read()
            else:
                handle.aio_notify_write()
        if handle.aio_is_dead() or handle.aio_is_closed():
            raise OSError(errno.ECONNRESET, "the server has closed the connection", self._uri)

    def _say_goodbye(self, handle: Any) -> None:
        """Where nothing is under way, and the line takes it; the server needs no more. Raises: Error."""
        if not self._under_way:
            handle.aio_disconnect()
            late = time.monotonic() + LINE_FREES
            while handle.aio_get_direction() & self._nbd.AIO_DIRECTION_WRITE and time.monotonic() < late:
                self._turn(handle, LINE_FREES)

    def _end_all(self, error: BaseException) -> None:
        with self._lock:
            self._error = error
            left = [*self._under_way, *self._new]
            self._new.clear()
            self._forget_wake()
        was_open = self._settled.is_set()
        self._under_way.clear()
        self._settled.set()
        for command in left:
            command.end(_anew(error))
        if was_open and not self._is_closing and isinstance(error, OSError):
            self.on_lost(error)

    def _given_up(self) -> OSError:
        return OSError(errno.ESHUTDOWN, "the connection was given up", self._uri)

    def _timed_out(self, what: str, seconds: float) -> OSError:
        return OSError(errno.ETIMEDOUT, f"the server {what} for {seconds:g} s", self._uri)

    def _as_os_error(self, error: Any) -> OSError:
        """What libnbd says, without the name of its function."""
        number = error.errnum or errno.EIO
        text = re.sub(r"^nbd_\w+: ", "", error.string or os.strerror(number))  # none of a size that is -1
        return OSError(number, text, self._uri)


def _anew(error: BaseException) -> BaseException:
    """The same for one more who waits: an exception that is raised twice keeps the frames of both."""
    return OSError(error.errno, error.strerror, error.filename) if isinstance(error, OSError) else error
