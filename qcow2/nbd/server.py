"""The server: lets clients in, as many as may be there at once; ends when told to, or when the last one has left."""

import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qcow2.driver.thread import start_quiet
from qcow2.nbd.connection import Connection
from qcow2.nbd.error import ClientGone, ProtocolViolation
from qcow2.nbd.export import Export
from qcow2.nbd.negotiation import Negotiation
from qcow2.nbd.stream import Stream

if TYPE_CHECKING:
    import ssl

NEGOTIATION_SECONDS = 10.0  # for all of it
ENDING_SECONDS = 2.0  # in which clients have to let us send their last replies; and in which to read them
MAX_THREADS = 512  # of all clients together; each client has one at least
RETRY_SECONDS = 0.1
QUIET_SECONDS = 10.0  # after each line that clients can make us write: they need not fill a disk with them

log = logging.getLogger("qcow2.nbd")


class Server:
    """Offers *export* to whoever connects to one of *listeners*: *limit* clients at once, 0 for any number.

    With *tls* nobody learns anything without it. Unless it *persists*, the server ends once clients have been there and
    none is any more.
    """

    def __init__(
        self,
        export: Export,
        listeners: Sequence[socket.socket],
        *,
        limit: int = 0,
        tls: "ssl.SSLContext | None" = None,
        persists: bool = False,
    ) -> None:
        self._export = export
        self._listeners = listeners
        self._limit = limit
        self._tls = tls
        self._persists = persists
        self._changed_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._state = threading.Condition()
        self._clients: dict[Stream, Connection | None] = {}
        self._nthreads = 0
        self._was_used = False
        self._is_stopping = False
        self._quiet_until = 0.0
        self._nunsaid = 0

    def run(self, *stop_fds: int) -> None:
        """Serve until one of *stop_fds* is readable, or nobody is left to serve; every client has left on return."""
        for listener in self._listeners:
            listener.setblocking(False)
        try:
            while not self._is_over():
                for listener in self._wait(stop_fds):
                    self._let_in(listener)
        finally:
            self._stop()
            os.close(self._changed_fd)

    def _wait(self, stop_fds: Sequence[int]) -> list[socket.socket]:
        """Where somebody knocks, and may come in."""
        poll = select.poll()
        for stop_fd in stop_fds:
            poll.register(stop_fd, select.POLLIN)
        poll.register(self._changed_fd, select.POLLIN)
        if not self._limit or len(self._clients) < self._limit:
            for listener in self._listeners:
                poll.register(listener, select.POLLIN)
        ready = {fd for fd, _ in poll.poll()}
        if ready.intersection(stop_fds):
            self._is_stopping = True
            return []
        if self._changed_fd in ready:
            os.eventfd_read(self._changed_fd)
        return [listener for listener in self._listeners if listener.fileno() in ready]

    def _is_over(self) -> bool:
        with self._state:
            return self._is_stopping or (self._was_used and not self._clients and not self._persists)

    def _let_in(self, listener: socket.socket) -> None:
        if self._limit and len(self._clients) >= self._limit:
            return
        try:
            visitor, _ = listener.accept()
            visitor.setblocking(True)
            stream = Stream(visitor)
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # a limit on descriptors: who knocks goes on waiting
            self._complain(f"nobody can be let in for now: {error.strerror}")
            time.sleep(RETRY_SECONDS)
            return
        with self._state:
            self._clients[stream] = None
        if not self._start(lambda: self._serve(stream), is_first=True):
            self._leave(stream)

    def _start(self, function: Callable[[], None], *, is_first: bool = False) -> bool:
        """Run *function* on a thread of its own; whether there is one."""
        with self._state:
            if self._nthreads >= MAX_THREADS and not is_first:
                return False
            self._nthreads += 1

        def run() -> None:
            try:
                function()
            finally:
                with self._state:
                    self._nthreads -= 1

        thread = threading.Thread(target=run, name="nbd client", daemon=True)
        try:
            start_quiet(thread)
        except RuntimeError:  # a limit
            with self._state:
                self._nthreads -= 1
            return False
        return True

    def _serve(self, stream: Stream) -> None:
        """All of one client; what goes wrong ends its connection, and no other."""
        try:
            self._talk(stream)
        except ClientGone:
            pass
        except ProtocolViolation as violation:
            self._complain(f"a client breaks the protocol: {violation}")
        except Exception:  # the other clients' go on
            log.exception("a client's connection ends by a fault of ours")
        finally:
            self._leave(stream)

    def _complain(self, text: str) -> None:
        """Say *text*, or that there was more to say once something is said again."""
        with self._state:
            now = time.monotonic()
            if now < self._quiet_until:
                self._nunsaid += 1
                return
            nunsaid, self._nunsaid, self._quiet_until = self._nunsaid, 0, now + QUIET_SECONDS
        log.warning("%s%s", text, f" ({nunsaid} more lines were not said)" if nunsaid else "")

    def _talk(self, stream: Stream) -> None:
        stream.limit(NEGOTIATION_SECONDS)
        negotiation = Negotiation(stream, self._export, self._tls)
        agreed = negotiation.run()
        if agreed is None:
            return
        stream.limit(None)
        negotiation.stream.limit(None)
        connection = Connection(negotiation.stream, self._export, agreed, self._start)
        with self._state:
            self._was_used = True
            self._clients[stream] = connection
            if self._is_stopping:
                connection.stop()
        connection.serve()

    def _leave(self, stream: Stream) -> None:
        if self._is_stopping or not self._persists:  # our lock on the image may end with this client
            stream.wait_until_read(ENDING_SECONDS)
        stream.close()
        with self._state:
            del self._clients[stream]
            self._state.notify_all()
            os.eventfd_write(self._changed_fd, 1)

    def _stop(self) -> None:
        """Take no more requests, let clients read what they are owed, and see them off."""
        for listener in self._listeners:
            listener.close()
        with self._state:
            self._is_stopping = True
            for stream, connection in self._clients.items():
                stream.end_receiving()
                if connection is not None:
                    connection.stop()
            self._state.wait_for(lambda: not self._clients, ENDING_SECONDS)
            for stream in self._clients:
                stream.end()
            self._state.wait_for(lambda: not self._clients)
