"""A client of the NBD protocol that does as it is told, also what no client should; and a server for it."""

import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import qcow2
from tests.oracle import assert_not_corrupt
from tests.program import SERIAL, TIMEOUT, TOOL

FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED, LIST_CONTEXTS, SET_CONTEXTS = 1, 2, 3, 5, 6, 7, 8, 9, 10
ACK, SERVER, INFO_REPLY, CONTEXT = 1, 2, 3, 4
UNSUP, POLICY, INVALID, TLS_REQD, UNKNOWN = (1 << 31 | bit for bit in (1, 2, 3, 5, 6))
REPLY_MAGIC = 0x3E889045565A9
ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.argv[2], sys.argv[2:])
"""


class NbdError(Exception):
    """The server said no; the protocol's number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Server:
    """A `qcow2 serve-nbd` process on a listening socket that exists before it does, so nobody waits for its start."""

    def __init__(self, image: Path, *options: str) -> None:
        self.image = image
        self.options = options
        self.path = image.with_name(f"{next(SERIAL)}.nbd")
        self.uri = f"nbd+unix:///?socket={self.path}"

    def __enter__(self) -> "Server":
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(self.path))
            listener.listen(128)
            fd = listener.fileno()
            command = [
                sys.executable,
                "-SEc",
                ACTIVATE,
                str(fd),
                str(TOOL),
                "serve-nbd",
                *self.options,
                str(self.image),
            ]
            self.process = subprocess.Popen(command, pass_fds=[fd], stderr=subprocess.PIPE, text=True)
        return self

    def client(self, **wishes: object) -> "Client":
        """A new client."""
        return Client(self.path, **wishes)  # type: ignore[arg-type]

    def stop(self) -> str:
        """SIGTERM; what the server said until it ended well."""
        self.process.send_signal(signal.SIGTERM)
        return self.end()

    def end(self) -> str:
        """What the server said until it ended by itself, and well."""
        _, said = self.process.communicate(timeout=TIMEOUT)
        assert self.process.returncode == 0, said
        return said

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        assert self.process.stderr is not None
        if not self.process.stderr.closed:
            _, said = self.process.communicate(timeout=TIMEOUT)
            if error is not None and said:
                error.add_note(f"the server said: {said}")
        self.path.unlink(missing_ok=True)


@contextmanager
def empty_disk(directory: Path, size: int) -> Iterator[Server]:
    """A server of one, for as many clients as like to come."""
    path = directory / "disk.qcow2"
    qcow2.create(path, size)
    with Server(path, "-t", "-e", "0") as server:
        yield server
        server.stop()
    assert_not_corrupt(path)


class Client:
    """A connection; unless *waits*, it has gone to the transmission phase once it is made."""

    def __init__(
        self,
        path: Path,
        name: str = "",
        *,
        structured: bool = True,
        contexts: tuple[str, ...] = (),
        waits: bool = False,
    ) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(TIMEOUT)
        self.socket.connect(str(path))
        self.structured = structured
        self.contexts: dict[int, str] = {}
        self.cookie = 0
        if waits:
            return
        self.greet()
        if structured:
            assert self.option(STRUCTURED) == [(ACK, b"")]
        if contexts:
            self.set_contexts(name, contexts)
        self.go(name)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    # -- bytes

    def receive(self, nbytes: int) -> bytes:
        data = b""
        while len(data) < nbytes:
            part = self.socket.recv(nbytes - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def is_dropped(self) -> bool:
        """Whether the server has ended this connection; it has nothing more to say."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    # -- negotiation

    def greet(self, flags: int = 3) -> None:
        assert self.receive(18) == b"NBDMAGICIHAVEOPT\0\3"
        self.socket.sendall(struct.pack(">I", flags))

    def send_option(self, option: int, data: bytes = b"") -> None:
        self.socket.sendall(struct.pack(">8sII", b"IHAVEOPT", option, len(data)) + data)

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Type and data of each reply, up to the last one."""
        self.send_option(option, data)
        replies = []
        while True:
            magic, same, kind, nbytes = struct.unpack(">QIII", self.receive(20))
            assert (magic, same) == (REPLY_MAGIC, option)
            replies.append((kind, self.receive(nbytes)))
            if kind == ACK or kind >> 31:
                return replies

    def set_contexts(self, name: str, contexts: tuple[str, ...]) -> None:
        *found, (last, _) = self.option(SET_CONTEXTS, context_query(name, *contexts))
        assert last == ACK
        self.contexts = {struct.unpack(">I", data[:4])[0]: data[4:].decode() for _, data in found}

    def go(self, name: str = "", *infos: int, option: int = GO) -> dict[int, bytes]:
        """What the server tells of the export, by kind."""
        data = name.encode()
        wanted = struct.pack(f">I{len(data)}sH{len(infos)}H", len(data), data, len(infos), *infos)
        *found, (last, _) = self.option(option, wanted)
        if last != ACK:
            raise NbdError(last)
        told = {struct.unpack(">H", data[:2])[0]: data[2:] for _, data in found}
        self.size, self.flags = struct.unpack(">QH", told[0])
        return told

    # -- transmission

    def send(self, command: int, offset: int = 0, nbytes: int = 0, flags: int = 0, data: bytes = b"") -> int:
        """Send a request without waiting; its cookie."""
        self.cookie += 1
        self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, flags, command, self.cookie, offset, nbytes) + data)
        return self.cookie

    def request(self, *arguments: int, data: bytes = b"", flags: int = 0) -> "Reply":
        """Send a request and wait for its reply. Raises: NbdError."""
        command, offset, nbytes = (*arguments, 0, 0)[:3]
        cookie = self.send(command, offset, nbytes, flags, data)
        reply = self.reply(nbytes if command == READ else 0, offset)
        assert reply.cookie == cookie
        if reply.error:
            raise NbdError(reply.error)
        return reply

    def reply(self, nbytes: int = 0, offset: int = 0) -> "Reply":
        """The next reply, of a READ of *nbytes* at *offset* if there are any; chunks of one reply come in a row."""
        if not self.structured:
            magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
            assert magic == 0x67446698
            return Reply(cookie, error, self.receive(0 if error else nbytes))
        reply = Reply(0, 0, bytes(nbytes))
        missing, flags = nbytes, 0
        while not flags:
            magic, flags, kind, reply.cookie, length = struct.unpack(">IHHQI", self.receive(20))
            assert magic == 0x668E33EF
            content = self.receive(length)
            reply.kinds.append(kind)
            if kind == 1:
                at = struct.unpack(">Q", content[:8])[0] - offset
                reply.data = reply.data[:at] + content[8:] + reply.data[at + length - 8 :]
                missing -= length - 8
            elif kind == 2:
                missing -= struct.unpack(">QI", content)[1]
            elif kind == 5:
                numbers = struct.unpack(f">{length // 4}I", content)
                reply.extents[self.contexts[numbers[0]]] = list(zip(numbers[1::2], numbers[2::2], strict=True))
            elif kind >> 15:
                reply.error, size = struct.unpack(">IH", content[:6])
                reply.text = content[6 : 6 + size].decode()
        assert reply.error or not missing
        assert len(reply.data) == nbytes
        return reply

    def read(self, offset: int, nbytes: int, flags: int = 0) -> bytes:
        return self.request(READ, offset, nbytes, flags=flags).data

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        self.request(WRITE, offset, len(data), data=data, flags=flags)

    def status(self, offset: int, nbytes: int, flags: int = 0) -> dict[str, list[tuple[int, int]]]:
        return self.request(BLOCK_STATUS, offset, nbytes, flags=flags).extents


class Reply:
    """What came back."""

    def __init__(self, cookie: int, error: int, data: bytes) -> None:
        self.cookie = cookie
        self.error = error
        self.data = data
        self.text = ""
        self.kinds: list[int] = []
        self.extents: dict[str, list[tuple[int, int]]] = {}


def context_query(name: str, *queries: str) -> bytes:
    """The data of an option about contexts."""
    words = [word.encode() for word in queries]
    packed = b"".join(struct.pack(">I", len(word)) + word for word in words)
    return struct.pack(">I", len(name)) + name.encode() + struct.pack(">I", len(words)) + packed
