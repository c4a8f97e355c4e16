"""A Unix socket that carries bytes and file descriptors: whole messages out of whatever pieces arrive."""

import array
import contextlib
import errno
import os
import resource
import socket
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from ring.memory import close_shared
from vhost.message import MAX_FDS, MAX_PAYLOAD, REPLY_FLAGS, Header, Message, ProtocolViolation

FD_SIZE = array.array("i").itemsize
ANCILLARY_SIZE = socket.CMSG_SPACE(MAX_FDS * FD_SIZE)
NO_LINGER = struct.pack("ii", 0, 0)


class Hangup(Exception):
    """The peer closed its end."""


@dataclass(slots=True)
class Fds:
    """File descriptors that came with a message: each is taken by someone, or closed with the rest."""

    numbers: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self) -> int:
        """The next one, now the caller's to close."""
        return self.numbers.pop(0)

    def refuse_sockets(self) -> None:
        """Raises: OSError if one of them is a socket; all are closed then."""
        if any(stat.S_ISSOCK(os.fstat(fd).st_mode) for fd in self.numbers):
            self.close()
            raise OSError(errno.EINVAL, "a socket, where memory or an eventfd is wanted")

    def close(self) -> None:
        while self.numbers:
            close_received(self.numbers.pop())


def close_received(fd: int) -> None:
    """Close what came from a peer: no socket has us wait for whoever is to read what is in it (SO_LINGER)."""
    try:
        found = socket.socket(fileno=fd)
    except OSError:  # it is none
        close_shared(fd)
        return
    with found, contextlib.suppress(OSError):
        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)


class Channel:
    """One connected socket; neither reads nor writes block, so that its owner can wait for other things as well.

    Each call says so: a flag of the socket would be the peer's to change where it has the same open file.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._bytes = bytearray()
        self._fds = Fds()
        connection.settimeout(None)  # else Python would wait by itself

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._fds.close()
        self._socket.close()

    def receive(self) -> tuple[Message, Fds] | None:
        """Read what is there: a message once it is complete, with its fds, which are now the caller's; else None.

        Raises: Hangup at the end of the stream, ProtocolViolation if what comes cannot be a message.
        """
        while missing := self._missing():
            try:
                self._read(missing)
            except BlockingIOError:
                return None
        header = self._header()
        message = Message(header.request, header.flags, bytes(self._bytes[Header.LAYOUT.size :]), len(self._fds))
        fds, self._fds = self._fds, Fds()
        self._bytes.clear()
        return message, fds

    def reply(self, request: int, payload: bytes, fds: Sequence[int] = ()) -> None:
        """Send a reply, and with it *fds*, which stay the caller's."""
        self.send(request, REPLY_FLAGS, payload, fds)

    def send(self, request: int, flags: int, payload: bytes, fds: Sequence[int] = ()) -> None:
        """Send a message; a peer that lets them pile up until the socket is full is not one we can serve."""
        message = Header(request, flags, len(payload)).pack() + payload
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            sent = self._socket.sendmsg([message], rights, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        if sent != len(message):
            raise ProtocolViolation("the front-end does not read what it is sent")

    def _header(self) -> Header:
        return Header.parse(bytes(self._bytes[: Header.LAYOUT.size]))

    def _missing(self) -> int:
        """How many bytes the message under way still lacks, as far as is known."""
        if len(self._bytes) < Header.LAYOUT.size:
            return Header.LAYOUT.size - len(self._bytes)
        header = self._header()
        if header.size > MAX_PAYLOAD:
            raise ProtocolViolation(
                f"request {header.request} has a payload of {header.size} bytes, over {MAX_PAYLOAD}"
            )
        return Header.LAYOUT.size + header.size - len(self._bytes)

    def _read(self, nbytes: int) -> None:
        """Read at most *nbytes*, never past the message, so that fds stay with the message they came with."""
        data, ancillary, flags, _ = self._socket.recvmsg(
            nbytes, ANCILLARY_SIZE, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
        )
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._fds.numbers += array.array("i", payload[: len(payload) // FD_SIZE * FD_SIZE])
        if flags & socket.MSG_CTRUNC and len(self._fds) < MAX_FDS:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            raise OSError(errno.EMFILE, f"no room for the descriptors of a message: the limit is {limit}")
        if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_FDS:
            raise ProtocolViolation(f"a message came with more than {MAX_FDS} file descriptors")
        if not data:
            raise Hangup
        self._bytes += data
