"""A part of a disk that one client uses, many requests at once, and a model of it."""

import random
import struct
import threading
from dataclasses import dataclass

from tests import nbdclient as nbd
from tests.nbdclient import Client

DEPTH = 8
SIZES = (1, 512, 4096, 5000, 65536)
COMMANDS = (*[nbd.WRITE] * 4, nbd.READ, nbd.WRITE_ZEROES, nbd.TRIM, nbd.FLUSH)


@dataclass(frozen=True)
class Request:
    """One that is under way."""

    command: int
    offset: int  # in the zone
    data: bytes  # that it writes, or as long as what it reads

    @property
    def end(self) -> int:
        return self.offset + len(self.data)


class Zone:
    """*nbytes* of a disk from *start* on, all of them *fill* at first."""

    def __init__(self, start: int, nbytes: int, fill: bytes) -> None:
        self.start = start
        self.nbytes = nbytes
        self.nanswered = 0
        self.progress = threading.Semaphore(0)  # released whenever something was answered, and at the end
        self.failure: BaseException | None = None
        self._model = bytearray(fill * nbytes)
        self._under_way: dict[int, Request] = {}

    def use(self, client: Client, draw: random.Random) -> None:
        """Ask *client* for this and that until its server is gone; what was not answered then may have been done."""
        try:
            while True:
                while len(self._under_way) < DEPTH:
                    self._ask(client, draw)
                self._take_answer(client)
        except (EOFError, ConnectionError):
            pass
        except BaseException as failure:
            self.failure = failure
        self.progress.release()

    def _ask(self, client: Client, draw: random.Random) -> None:
        command, nbytes = draw.choice(COMMANDS), draw.choice(SIZES)
        if command == nbd.TRIM:  # of whole clusters, which read as zeros then
            nbytes = 65536
        offset = draw.randrange(self.nbytes - nbytes)
        offset -= offset % 65536 if command == nbd.TRIM else 0
        data = draw.randbytes(nbytes) if command in (nbd.WRITE, nbd.READ) else bytes(nbytes)
        request = Request(command, offset, b"" if command == nbd.FLUSH else data)
        if any(request.offset < other.end and other.offset < request.end for other in self._under_way.values()):
            return
        flags = nbd.FUA if command == nbd.WRITE and draw.random() < 0.05 else 0
        where = (0, 0) if command == nbd.FLUSH else (self.start + offset, nbytes)
        self._under_way[client.cookie + 1] = request
        client.send(command, *where, flags, data if command == nbd.WRITE else b"")

    def _take_answer(self, client: Client) -> None:
        """The next chunk, of whichever request: those of two may alternate."""
        magic, flags, kind, cookie, nbytes = struct.unpack(">IHHQI", client.receive(20))
        content = client.receive(nbytes)
        request = self._under_way[cookie]
        assert (magic, kind >> 15) == (0x668E33EF, 0), content
        if kind in (1, 2):
            offset = struct.unpack(">Q", content[:8])[0] - self.start
            data = content[8:] if kind == 1 else bytes(struct.unpack(">I", content[8:])[0])
            assert self._model[offset : offset + len(data)] == data
        if flags & 1:
            del self._under_way[cookie]
            if request.command not in (nbd.READ, nbd.FLUSH):
                self._model[request.offset : request.end] = request.data
            self.nanswered += 1
            self.progress.release()

    def compare(self, found: bytes) -> None:
        """The zone must hold what was answered, and where nothing was either the old or the new."""
        for request in self._under_way.values():
            if request.command not in (nbd.READ, nbd.FLUSH):
                self._model[request.offset : request.end] = found[request.offset : request.end]
        wrong = [at for at in range(0, self.nbytes, 512) if self._model[at : at + 512] != found[at : at + 512]]
        assert wrong == [], f"lost at {self.start + wrong[0]:#x}"
