"""A visit of an NBD client as a fuzzer makes it up, and what must hold.

An input is a row of records, each an option or a request, sensible or not; they go over a socket to our
server's own classes, in this process. Whatever it is, the connection ends in one of two ways, every answer is one of
the protocol's, and what is read is what was written: a model knows.
"""

import contextlib
import random
import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import qcow2
from qcow2.driver.shared import SharedDriver
from qcow2.engine.opened import OpenOptions
from qcow2.nbd.connection import Connection
from qcow2.nbd.error import ClientGone, ProtocolViolation
from qcow2.nbd.export import Export, Terms
from qcow2.nbd.negotiation import Negotiation
from qcow2.nbd.stream import Stream
from qcow2.nbd.wire import Command
from qcow2.node.chain import Chain

SIZE = 1 << 20
RECORD = struct.Struct(">BBIIB")  # what, how, where, how much, with what
SET_CONTEXTS, STRUCTURED, GO = 10, 8, 7
MAX_DATA = 64 << 10
RAW = 255
USUAL = (*[Command.READ, Command.WRITE] * 3, Command.FLUSH, Command.TRIM, Command.WRITE_ZEROES, Command.BLOCK_STATUS)


class Finding(AssertionError):
    """Something that must hold does not."""


@dataclass(frozen=True)
class Asked:
    """One request."""

    command: int
    offset: int
    nbytes: int
    data: bytes


@dataclass
class Script:
    """What the client sends, and what its answers have to be."""

    sent: bytearray = field(default_factory=bytearray)
    requests: dict[int, Asked] = field(default_factory=dict)  # by cookie


class Visits:
    """A disk, and visits to it, one after the other."""

    def __init__(self, place: Path) -> None:
        qcow2.create(place / "disk", SIZE, cluster_size=4096)
        self._chain = Chain(log_directory=str(place))
        self._node = self._chain.open(str(place / "disk"), "qcow2", OpenOptions(writable=True))
        self._driver = SharedDriver()
        self._export = Export(self._node, self._driver, Terms(name="", description="fuzz"))
        self._model = bytearray(SIZE)

    def close(self) -> None:
        """Leave the image clean."""
        self._driver.run(self._node.close())
        self._driver.close()
        self._chain.close()

    def visit(self, data: bytes) -> None:
        """Let a client do as *data* says. Raises: Finding, or what a fault of the server's raises."""
        script = Script()
        ours, theirs = socket.socketpair()
        said = bytearray()

        def listen() -> None:
            while part := theirs.recv(1 << 16):
                said.extend(part)

        def talk() -> None:
            with contextlib.suppress(OSError):
                theirs.sendall(script.sent)
                theirs.shutdown(socket.SHUT_WR)

        compose(data, script)
        threads = [threading.Thread(target=each) for each in (listen, talk)]
        stream = Stream(ours)
        for thread in threads:
            thread.start()
        try:
            agreed = Negotiation(stream, self._export, None).run()
            if agreed is not None:
                Connection(stream, self._export, agreed, lambda _: False).serve()
        except (ClientGone, ProtocolViolation):
            agreed = None
        finally:
            stream.end()
            for thread in threads:
                thread.join()
            stream.close()
            theirs.close()
        self._driver.run(self._node.flush())
        known = follow(script, answers_in(bytes(said), script), self._model)
        found = bytearray(SIZE)
        self._export.read(0, memoryview(found))
        wrong = [at for at in range(0, SIZE, 512) if _differ(found, self._model, known, at)]
        if wrong:
            raise Finding(f"the disk holds other bytes than were written at {wrong[:9]}")
        self._model[:] = found


def _differ(found: bytearray, model: bytearray, known: bytearray, at: int) -> bool:
    """Whether a sector holds what nobody wrote."""
    if found[at : at + 512] == model[at : at + 512]:
        return False
    return any(known[i] and found[i] != model[i] for i in range(at, at + 512))


def compose(data: bytes, script: Script) -> None:
    """Turn *data* into what a client sends."""
    script.sent += struct.pack(">I", 3 if not data or data[0] < 240 else data[0])
    has_gone = False
    for what, how, where, nbytes, fill in RECORD.iter_unpack(data[: len(data) // RECORD.size * RECORD.size]):
        if what == RAW:
            script.sent += bytes([how]) * (where % 64)
        elif not has_gone:
            option = what % 12
            script.sent += struct.pack(">8sI", b"IHAVEOPT", option)
            content = _option_data(option, how, where, nbytes)
            script.sent += struct.pack(">I", len(content) + (how == 7)) + content
            has_gone = option in (1, GO) and how % 4 == 0
        else:
            _request(script, what % 9, how, where, nbytes, fill)


def _option_data(option: int, how: int, where: int, nbytes: int) -> bytes:
    """Sensible if *how* is a multiple of four."""
    if how % 4 == 1:
        return struct.pack(">II", where, nbytes)
    if how % 4 == 2:
        return bytes(where % 5000)
    name = b"" if how % 4 == 0 else b"x" * (where % 3)
    if option in (6, GO):
        return struct.pack(">I", len(name)) + name + struct.pack(">H4H", 4, 0, 1, 2, 3)
    if option in (9, SET_CONTEXTS):
        words = [b"base:allocation", b"base:", b"qemu:dirty-bitmap:x"][: nbytes % 4]
        return struct.pack(">II", 0, len(words)) + b"".join(struct.pack(">I", len(word)) + word for word in words)
    return name


def _request(script: Script, command: int, how: int, where: int, nbytes: int, fill: int) -> None:
    offset = where % (SIZE + 512) if where < 1 << 31 else where << 32
    length = nbytes % MAX_DATA if nbytes < 1 << 31 else nbytes
    if command == Command.WRITE:
        length %= MAX_DATA
    cookie = len(script.requests) + 1
    data = bytes([fill]) * length if command == Command.WRITE else b""
    script.requests[cookie] = Asked(command, offset, length, data)
    script.sent += struct.pack(">IHHQQI", 0x25609513, how & 31, command, cookie, offset, length) + data


@dataclass
class Answer:
    """All that came back for one request."""

    error: int = 0
    data: bytearray = field(default_factory=bytearray)
    missing: int = 0  # bytes of a Command.READ that nothing was said about


def answers_in(said: bytes, script: Script) -> dict[int, Answer]:
    """By cookie, of what has been answered to the end. Raises: Finding for what is none of the protocol's."""
    if said[:18] != b"NBDMAGICIHAVEOPT\0\3":
        raise Finding(f"greeting {said[:18]!r}")
    at, is_structured, has_gone = 18, False, False
    while at < len(said) and not has_gone:
        magic, option, kind, nbytes = struct.unpack_from(">QIII", said.ljust(at + 20, b"\0"), at)
        if magic != 0x3E889045565A9:  # of EXPORT_NAME, whose answer has no such head
            at, has_gone = at + 10, True
            break
        at += 20 + nbytes
        is_structured = is_structured or (option == STRUCTURED and kind == 1)
        has_gone = option == GO and kind == 1
    answers: dict[int, Answer] = {}
    done: set[int] = set()
    while at < len(said):
        at = (_structured if is_structured else _simple)(said, at, script, answers, done)
    if at != len(said):
        raise Finding(f"{at - len(said)} bytes are missing at the end")
    if missing := answers.keys() - done:
        raise Finding(f"no end of the answers to {missing}")
    return answers


def _simple(said: bytes, at: int, script: Script, answers: dict[int, Answer], done: set[int]) -> int:
    magic, error, cookie = struct.unpack_from(">IIQ", said, at)
    if magic != 0x67446698 or cookie not in script.requests or cookie in done:
        raise Finding(f"simple reply {magic:#x} to {cookie}")
    request = script.requests[cookie]
    nbytes = request.nbytes if request.command == Command.READ and not error else 0
    answers[cookie] = Answer(error, bytearray(said[at + 16 : at + 16 + nbytes]))
    done.add(cookie)
    return at + 16 + nbytes


def _structured(said: bytes, at: int, script: Script, answers: dict[int, Answer], done: set[int]) -> int:
    magic, flags, kind, cookie, nbytes = struct.unpack_from(">IHHQI", said, at)
    if magic != 0x668E33EF or cookie not in script.requests or cookie in done or kind not in (0, 1, 2, 5, 32769):
        raise Finding(f"chunk {kind} of {magic:#x} to {cookie}")
    request = script.requests[cookie]
    answer = answers.setdefault(cookie, Answer())
    if kind in (1, 2):
        if request.command != Command.READ:
            raise Finding(f"data for command {request.command}")
        (start,) = struct.unpack_from(">Q", said, at + 20)
        size = nbytes - 8 if kind == 1 else struct.unpack_from(">I", said, at + 28)[0]
        if not request.offset <= start < start + size <= request.offset + request.nbytes:
            raise Finding(f"{size} bytes at {start}, asked for {request}")
        if not answer.data:
            answer.data, answer.missing = bytearray(request.nbytes), request.nbytes
        answer.missing -= size
        if kind == 1:
            first = start - request.offset
            answer.data[first : first + size] = said[at + 28 : at + 28 + size]
    if kind >> 15:
        (answer.error,) = struct.unpack_from(">I", said, at + 20)
    if flags & 1:
        done.add(cookie)
        if answer.missing and not answer.error:
            raise Finding(f"{answer.missing} bytes are missing of {request}")
    return at + 20 + nbytes


def follow(script: Script, answers: dict[int, Answer], model: bytearray) -> bytearray:
    """Do in *model* what was answered as done, in order; which of its bytes are known. Raises: Finding."""
    known = bytearray(b"\1" * SIZE)
    for cookie, answer in sorted(answers.items()):
        request = script.requests[cookie]
        part = slice(request.offset, request.offset + request.nbytes)
        if answer.error:
            continue
        match request.command:
            case Command.READ if all(known[part]) and answer.data != model[part]:
                raise Finding(f"{request} read other bytes than were written")
            case Command.WRITE:
                model[part] = request.data
                known[part] = b"\1" * request.nbytes
            case Command.WRITE_ZEROES:
                model[part] = bytes(request.nbytes)
                known[part] = b"\1" * request.nbytes
            case Command.TRIM:
                known[part] = bytes(request.nbytes)
    return known


def random_visit(draw: random.Random) -> bytes:
    """One whose client mostly knows what it does."""
    records = [(STRUCTURED, 0), (SET_CONTEXTS, 0), (GO, 0)] if draw.random() < 0.8 else [(GO, 0)]
    if draw.random() < 0.3:
        records = [(draw.randrange(256), draw.randrange(256)) for _ in range(draw.randrange(8))] + records
    data = b"".join(RECORD.pack(what, how, draw.getrandbits(32), 1, 0) for what, how in records)
    for _ in range(draw.randrange(30)):
        what = draw.choice(USUAL) if draw.random() < 0.97 else draw.choice((*range(9), RAW))
        where = draw.getrandbits(31 if draw.random() < 0.95 else 32)
        nbytes = draw.getrandbits(31 if draw.random() < 0.95 else 32)
        data += RECORD.pack(what, draw.choice((*[0] * 12, 1, 2, 4, 8, 255)), where, nbytes, draw.randrange(256))
    return data


@contextlib.contextmanager
def visits() -> Iterator[Visits]:
    """A new disk, gone at the end."""
    place = Path(tempfile.mkdtemp())
    try:
        found = Visits(place)
        yield found
        found.close()
    finally:
        shutil.rmtree(place)
