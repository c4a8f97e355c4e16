"""A client's socket as a stream of bytes, in the clear or through TLS; one thread may receive while others send."""

import contextlib
import os
import socket
import ssl
import threading
import time

from qcow2.nbd.error import ClientGone

TLS_STEP = 64 << 10


class Stream:
    """A connected socket, and ours to close."""

    is_encrypted = False

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._deadline: float | None = None
        self.sending = threading.Lock()  # held for as many `send`s as belong together
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def limit(self, seconds: float | None) -> None:
        """Let everything that the client has to do take so many *seconds* together; None: as long as it likes."""
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self.socket.settimeout(seconds)

    def _hurry(self) -> None:
        """Raises: ClientGone if its time is over."""
        if self._deadline is None:
            return
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise ClientGone
        self.socket.settimeout(left)

    def receive_into(self, view: memoryview) -> None:
        """Fill *view*. Raises: ClientGone."""
        while len(view):
            self._hurry()
            try:
                count = self.socket.recv_into(view, 0, socket.MSG_WAITALL if self._deadline is None else 0)
            except OSError:
                raise ClientGone from None
            if not count:
                raise ClientGone
            view = view[count:]

    def receive(self, nbytes: int) -> bytes:
        """The next *nbytes*, which the caller has bounded. Raises: ClientGone."""
        data = bytearray(nbytes)
        self.receive_into(memoryview(data))
        return bytes(data)

    def send(self, *pieces: bytes | bytearray | memoryview) -> None:
        """Send *pieces*, one after the other, with `sending` held. Raises: ClientGone."""
        views = [memoryview(piece) for piece in pieces]
        try:
            while views:
                self._hurry()
                count = self.socket.sendmsg(views)
                while views and count >= len(views[0]):
                    count -= len(views.pop(0))
                if count:
                    views[0] = views[0][count:]
        except OSError:
            raise ClientGone from None

    def send_file(self, header: bytes, fd: int, host_offset: int, nbytes: int) -> int:
        """Send *header*, then *nbytes* of a file without a copy of ours; how many came, fewer if it ends there.

        With `sending` held. Raises: ClientGone; OSError if the file cannot be read, then some may have been sent.
        """
        try:
            self.socket.sendall(header, socket.MSG_MORE)
        except OSError:
            raise ClientGone from None
        sent = 0
        while sent < nbytes:
            try:
                count = os.sendfile(self.socket.fileno(), fd, host_offset + sent, nbytes - sent)
            except (BrokenPipeError, ConnectionError):
                raise ClientGone from None
            if not count:
                break
            sent += count
        return sent

    def end_receiving(self) -> None:
        """Let whoever receives find the end; what is to be sent still can be."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RD)

    def end(self) -> None:
        """Let whoever sends or receives find the end."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket; nobody uses it any more."""
        self.socket.close()


class TlsStream(Stream):
    """The same, encrypted; takes *plain*'s socket over.

    What OpenSSL keeps of a connection is for one thread at a time, so it is not given the socket: only buffers.
    """

    is_encrypted = True

    def __init__(self, plain: Stream, context: ssl.SSLContext) -> None:
        self.socket = plain.socket
        self._deadline = plain._deadline
        self.sending = threading.Lock()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._using = threading.Lock()  # of `_tls`
        self._passing = threading.Lock()  # what was encrypted first is sent first

    def shake_hands(self) -> None:
        """Agree on keys with the client. Raises: ClientGone."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._pass_on()
                self._take_in()
            except ssl.SSLError:
                with contextlib.suppress(ClientGone):
                    self._pass_on()  # the alert that says why
                raise ClientGone from None
            else:
                self._pass_on()
                return

    def receive_into(self, view: memoryview) -> None:
        """Fill *view*. Raises: ClientGone."""
        while len(view):
            try:
                with self._using:
                    count = self._tls.read(len(view), view)
            except ssl.SSLWantReadError:
                if self._outgoing.pending:
                    self._pass_on()
                self._take_in()
                continue
            except ssl.SSLError:
                raise ClientGone from None
            if not count:
                raise ClientGone
            view = view[int(count) :]

    def send(self, *pieces: bytes | bytearray | memoryview) -> None:
        """Send *pieces*, one after the other, with `sending` held. Raises: ClientGone."""
        for piece in pieces:
            view = memoryview(piece)
            while len(view):
                try:
                    with self._using:
                        count = self._tls.write(view[:TLS_STEP])
                except ssl.SSLError:
                    raise ClientGone from None
                view = view[count:]
                self._pass_on()

    def _pass_on(self) -> None:
        with self._passing:
            with self._using:
                data = self._outgoing.read()
            if data:
                super().send(data)

    def _take_in(self) -> None:
        self._hurry()
        try:
            data = self.socket.recv(TLS_STEP)
        except OSError:
            raise ClientGone from None
        if not data:
            raise ClientGone
        with self._using:
            self._incoming.write(data)
