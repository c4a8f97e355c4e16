"""A client's socket as a stream of bytes; one thread may receive while others send."""

import contextlib
import fcntl
import os
import socket
import termios
import threading
import time
from array import array

from qcow2.nbd.error import ClientGone

DEAD_SECONDS = 60  # until a host that says nothing is asked whether it is there; three times
LOOK_SECONDS = 0.01


class Stream:
    """A connected socket, and ours to close."""

    is_encrypted = False

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.deadline: float | None = None
        self.sending = threading.Lock()  # held for as many `send`s as belong together
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, DEAD_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, DEAD_SECONDS // 3)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)

    def limit(self, seconds: float | None) -> None:
        """Let everything that the client has to do take so many *seconds* together; None: as long as it likes."""
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.socket.settimeout(seconds)

    def hurry(self) -> None:
        """Raises: ClientGone if its time is over."""
        if self.deadline is None:
            return
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise ClientGone
        self.socket.settimeout(left)

    def receive_into(self, view: memoryview) -> None:
        """Fill *view*. Raises: ClientGone."""
        while len(view):
            self.hurry()
            try:
                count = self.socket.recv_into(view, 0, socket.MSG_WAITALL if self.deadline is None else 0)
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
                self.hurry()
                count = self.socket.sendmsg(views)
                while views and count >= len(views[0]):
                    count -= len(views.pop(0))
                if count:
                    views[0] = views[0][count:]
        except OSError:
            raise ClientGone from None

    def send_file(self, header: bytes, fd: int, host_offset: int, nbytes: int) -> int:
        """Send *header*, then *nbytes* of a file without a copy of ours; how many came, fewer if the file has no more
        or cannot be read so: the caller owes the rest of what the header has promised.

        With `sending` held. Raises: ClientGone.
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
            except OSError:  # of the file; a client that is gone in another way shows when the rest is sent
                break
            if not count:
                break
            sent += count
        return sent

    def wait_until_read(self, seconds: float) -> None:
        """Until the client has read what it was sent, or so many *seconds* are over.

        What was sent from a file are the file's own pages till then: who changes the file changes the reply. Of TCP the
        other host's kernel has it, which on this host is no more than that.
        """
        late = time.monotonic() + seconds
        while self._is_unread() and time.monotonic() < late:
            time.sleep(LOOK_SECONDS)

    def _is_unread(self) -> bool:
        nbytes = array("i", [0])
        try:
            fcntl.ioctl(self.socket, termios.TIOCOUTQ, nbytes)  # SIOCOUTQ
        except OSError:
            return False
        return nbytes[0] > 0

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
