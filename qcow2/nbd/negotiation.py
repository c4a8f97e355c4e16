"""The first half of a connection: what the client wants, and what it is told of the export."""

from dataclasses import dataclass, field
from struct import Struct
from typing import TYPE_CHECKING

from qcow2.nbd import wire
from qcow2.nbd.error import ProtocolViolation
from qcow2.nbd.export import MAX_REQUEST, PREFERRED_BLOCK, Export
from qcow2.nbd.stream import Stream
from qcow2.nbd.wire import Answer, Handshake, Info, Option

if TYPE_CHECKING:
    import ssl

MAX_OPTION = 64 << 10  # bytes of data
MAX_NAME = 4096  # bytes of a name, as the protocol says
MAX_QUERIES = 1024


class _Refused(Exception):
    """The option is answered with an error, and the client may go on."""

    def __init__(self, answer: Answer, text: str) -> None:
        super().__init__(text)
        self.answer = answer


@dataclass(slots=True)
class Agreement:
    """What both sides go by once the client may ask for data."""

    is_structured: bool = False
    contexts: list[int] = field(default_factory=list)  # numbers of those that BLOCK_STATUS tells


class Negotiation:
    """Talks with the client of *stream* about *export*; with *tls* nothing is said before it is in use."""

    def __init__(self, stream: Stream, export: Export, tls: "ssl.SSLContext | None") -> None:
        self.stream = stream
        self._export = export
        self._tls = tls
        self._agreed = Agreement()
        self._pads = True

    def run(self) -> Agreement | None:
        """What was agreed on; None if the client wanted no more than that. `stream` may be another one then.

        Raises: ClientGone, ProtocolViolation.
        """
        offered = Handshake.FIXED_NEWSTYLE | Handshake.NO_ZEROES
        self._send(wire.GREETING.pack(wire.INIT_MAGIC, wire.OPTION_MAGIC, offered))
        (flags,) = wire.CLIENT_FLAGS.unpack(self.stream.receive(wire.CLIENT_FLAGS.size))
        if flags & ~int(offered):
            raise ProtocolViolation(f"unknown handshake flags {flags:#x}")
        self._pads = not flags & Handshake.NO_ZEROES
        is_fixed = bool(flags & Handshake.FIXED_NEWSTYLE)
        while True:
            option, data = self._next_option()
            if not is_fixed and option != Option.EXPORT_NAME:
                raise ProtocolViolation(f"option {option} of a client that knows only EXPORT_NAME")
            if option == Option.EXPORT_NAME:
                return self._take_name(data)
            if option == Option.ABORT:
                self._reply(option, Answer.ACK)
                return None
            try:
                if self._answer(option, data):
                    return self._agreed
            except _Refused as refusal:
                self._reply(option, refusal.answer, str(refusal).encode())

    def _next_option(self) -> tuple[int, bytes]:
        magic, option, nbytes = wire.OPTION.unpack(self.stream.receive(wire.OPTION.size))
        if magic != wire.OPTION_MAGIC:
            raise ProtocolViolation(f"option magic {magic.hex()}")
        if nbytes > MAX_OPTION:
            raise ProtocolViolation(f"option {option} of {nbytes} bytes, limit {MAX_OPTION}")
        return option, self.stream.receive(nbytes)

    def _answer(self, option: int, data: bytes) -> bool:
        """Answer one option; whether it was the last one. Raises: _Refused."""
        if self._tls is not None and not self.stream.is_encrypted and option != Option.STARTTLS:
            raise _Refused(Answer.ERR_TLS_REQD, "the server wants TLS first")
        match option:
            case Option.LIST:
                _require_nothing(data)
                self._list()
            case Option.STARTTLS:
                _require_nothing(data)
                self._start_tls()
            case Option.INFO | Option.GO:
                self._inform(option, data)
                return option == Option.GO
            case Option.STRUCTURED_REPLY:
                _require_nothing(data)
                self._agreed.is_structured = True
                self._reply(option, Answer.ACK)
            case Option.LIST_META_CONTEXT | Option.SET_META_CONTEXT:
                self._tell_contexts(option, data)
            case _:
                raise _Refused(Answer.ERR_UNSUP, f"option {option} is not known")
        return False

    def _take_name(self, name: bytes) -> Agreement:
        """The old way to begin, which has no way to refuse."""
        if self._tls is not None and not self.stream.is_encrypted:
            raise ProtocolViolation("EXPORT_NAME before TLS")
        if name != self._export.name:
            raise ProtocolViolation(f"no export {name[:64]!r}")
        flags = self._export.flags(is_structured=self._agreed.is_structured)
        self._send(wire.EXPORT.pack(self._export.size, flags), wire.ZEROES_AFTER_EXPORT if self._pads else b"")
        return self._agreed

    def _list(self) -> None:
        export = self._export
        content = wire.U32.pack(len(export.name)) + export.name + export.description
        self._reply(Option.LIST, Answer.SERVER, content)
        self._reply(Option.LIST, Answer.ACK)

    def _start_tls(self) -> None:
        if self._tls is None:
            raise _Refused(Answer.ERR_POLICY, "the server has no TLS")
        if self.stream.is_encrypted:
            raise _Refused(Answer.ERR_INVALID, "TLS is in use")
        from qcow2.nbd.tls import TlsStream  # and with it OpenSSL

        self._reply(Option.STARTTLS, Answer.ACK)
        encrypted = TlsStream(self.stream, self._tls)
        encrypted.shake_hands()
        self.stream = encrypted
        self._agreed = Agreement()  # what was said in the clear may have been somebody else's

    def _inform(self, option: int, data: bytes) -> None:
        fields = _Fields(data)
        name = fields.text()
        wanted = {fields.number(wire.U16) for _ in range(fields.number(wire.U16))}
        fields.require_end()
        self._require_ours(name)
        export = self._export
        flags = export.flags(is_structured=self._agreed.is_structured)
        self._reply(option, Answer.INFO, wire.INFO_EXPORT.pack(Info.EXPORT, export.size, flags))
        if Info.NAME in wanted:
            self._reply(option, Answer.INFO, wire.U16.pack(Info.NAME) + export.name)
        if Info.DESCRIPTION in wanted and export.description:
            self._reply(option, Answer.INFO, wire.U16.pack(Info.DESCRIPTION) + export.description)
        if Info.BLOCK_SIZE in wanted:
            sizes = wire.INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, export.min_block, PREFERRED_BLOCK, MAX_REQUEST)
            self._reply(option, Answer.INFO, sizes)
        self._reply(option, Answer.ACK)

    def _tell_contexts(self, option: int, data: bytes) -> None:
        if not self._agreed.is_structured:
            raise _Refused(Answer.ERR_INVALID, "contexts need structured replies")
        is_set = option == Option.SET_META_CONTEXT
        if is_set:
            self._agreed.contexts = []
        fields = _Fields(data)
        name = fields.text()
        nqueries = fields.number(wire.U32)
        if nqueries > MAX_QUERIES:
            raise _Refused(Answer.ERR_INVALID, f"{nqueries} queries, limit {MAX_QUERIES}")
        queries = [fields.text() for _ in range(nqueries)]
        fields.require_end()
        self._require_ours(name)
        found = list(self._export.contexts) if not queries and not is_set else []
        for number, context in enumerate(self._export.contexts):
            if any(_selects(query, context.name, is_set=is_set) for query in queries):
                found.append(context)
                if is_set:
                    self._agreed.contexts.append(number)
        for context in found:
            number = self._export.contexts.index(context) if is_set else 0
            self._reply(option, Answer.META_CONTEXT, wire.U32.pack(number) + context.name)
        self._reply(option, Answer.ACK)

    def _require_ours(self, name: bytes) -> None:
        if name != self._export.name:
            raise _Refused(Answer.ERR_UNKNOWN, f"no export '{name[:64].decode(errors='replace')}'")

    def _reply(self, option: int, answer: Answer, data: bytes = b"") -> None:
        self._send(wire.OPTION_REPLY.pack(wire.OPTION_REPLY_MAGIC, option, answer, len(data)), data)

    def _send(self, *pieces: bytes) -> None:
        with self.stream.sending:
            self.stream.send(b"".join(pieces))


def _selects(query: bytes, name: bytes, *, is_set: bool) -> bool:
    """Whether *query* means the context *name*; one that ends in a colon asks for a list of all that begin so."""
    return query == name or (not is_set and query.endswith(b":") and name.startswith(query))


def _require_nothing(data: bytes) -> None:
    if data:
        raise _Refused(Answer.ERR_INVALID, f"{len(data)} bytes of data where there are none")


class _Fields:
    """What the data of an option holds, from front to back. Raises: _Refused where it is too short."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, record: Struct) -> int:
        """The next number."""
        (number,) = record.unpack(self._take(record.size))
        return int(number)

    def text(self) -> bytes:
        """The next string, its length in front of it."""
        nbytes = self.number(wire.U32)
        if nbytes > MAX_NAME:
            raise _Refused(Answer.ERR_INVALID, f"a name of {nbytes} bytes, limit {MAX_NAME}")
        return self._take(nbytes)

    def _take(self, nbytes: int) -> bytes:
        end = self._at + nbytes
        if end > len(self._data):
            raise _Refused(Answer.ERR_INVALID, f"{len(self._data)} bytes of data, {end} wanted")
        start, self._at = self._at, end
        return self._data[start:end]

    def require_end(self) -> None:
        """Nothing may be left."""
        if self._at != len(self._data):
            raise _Refused(Answer.ERR_INVALID, f"{len(self._data)} bytes of data, {self._at} wanted")
