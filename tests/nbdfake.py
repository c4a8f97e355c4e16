"""An NBD server that does what no good one does, as told: lacks, holds back, cuts short, hangs up."""

import socket
import struct
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tests.nbdclient import ACK, DISC, FLUSH, GO, INFO_REPLY, READ, REPLY_MAGIC, UNSUP, WRITE, WRITE_ZEROES
from tests.patience import TIMEOUT

HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_ZEROES = 1 << 0, 1 << 1, 1 << 2, 1 << 6
ALL = HAS_FLAGS | SEND_FLUSH | SEND_ZEROES


class FakeServer:
    """Serves *size* bytes, of which all are `o` at first, to one client after the other, on a thread.

    It answers *nanswered* requests of each, and holds the others back until `let_go`; after `hang_up` it has no client.
    """

    def __init__(
        self,
        path: Path,
        size: int,
        *,
        told_size: int | None = None,
        flags: int = ALL,
        nanswered: int = 1 << 30,
        greets: bool = True,
    ) -> None:
        self.uri = f"nbd+unix:///?socket={path}"
        self.content = bytearray(b"o" * size)
        self.commands: list[int] = []
        self._told_size = size if told_size is None else told_size
        self._path = path
        self._flags = flags
        self._nanswered = nanswered
        self._greets = greets
        self._changed = threading.Condition()
        self._is_held = False  # one is kept waiting
        self._client: socket.socket | None = None

    def __enter__(self) -> "FakeServer":
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self._path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._main)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.let_go()
        self._listener.shutdown(socket.SHUT_RDWR)
        self.hang_up()
        self._thread.join(TIMEOUT)
        self._listener.close()
        self._path.unlink()

    def wait_for_one(self) -> None:
        """Until a request is held back."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._is_held, TIMEOUT)

    def hold(self) -> None:
        """Answer none from now on."""
        with self._changed:
            self._nanswered = len(self.commands)

    def let_go(self) -> None:
        """Answer all from now on."""
        with self._changed:
            self._nanswered = 1 << 30
            self._changed.notify_all()

    def hang_up(self) -> None:
        """Leave the client, in the midst of whatever it is."""
        with self._changed:
            if self._client is not None:
                with suppress(OSError):  # the other end was first
                    self._client.shutdown(socket.SHUT_RDWR)
                self._client = None
            self._changed.notify_all()

    def _main(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client:
                with self._changed:
                    self._client = client
                with suppress(EOFError, OSError):
                    self._serve(client)
                with self._changed:  # before it is closed: who hangs up would find a closed socket
                    self._client = None

    def _serve(self, client: socket.socket) -> None:
        if not self._greets:
            client.recv(1)
            return
        client.sendall(struct.pack(">8s8sH", b"NBDMAGIC", b"IHAVEOPT", 3))
        _receive(client, 4)
        option = 0
        while option != GO:
            _, option, nbytes = struct.unpack(">8sII", _receive(client, 16))
            _receive(client, nbytes)
            if option == GO:
                info = struct.pack(">HQH", 0, self._told_size, self._flags)
                client.sendall(struct.pack(">QIII", REPLY_MAGIC, option, INFO_REPLY, len(info)) + info)
            client.sendall(struct.pack(">QIII", REPLY_MAGIC, option, ACK if option == GO else UNSUP, 0))
        while True:
            self._answer(client)

    def _answer(self, client: socket.socket) -> None:
        _, _, command, cookie, offset, nbytes = struct.unpack(">IHHQQI", _receive(client, 28))
        if command == DISC:
            raise EOFError
        data = _receive(client, nbytes) if command == WRITE else b""
        with self._changed:
            self._is_held = len(self.commands) >= self._nanswered
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self.commands) < self._nanswered or self._client is None)
            self._is_held = False
            self.commands.append(command)
        if command in (WRITE, WRITE_ZEROES):
            self.content[offset : offset + nbytes] = data or bytes(nbytes)
        told = self.content[offset : offset + nbytes] if command == READ else b""
        assert command in (READ, WRITE, WRITE_ZEROES, FLUSH)
        client.sendall(struct.pack(">IIQ", 0x67446698, 0, cookie) + told)


def _receive(client: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        piece = client.recv(nbytes - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data
