"""What a client is answered: simple replies, or structured ones of several chunks."""

from collections.abc import Callable

from qcow2.driver.file import ZEROS
from qcow2.error import ImageError
from qcow2.nbd import wire
from qcow2.nbd.error import ClientGone
from qcow2.nbd.export import Export, Piece
from qcow2.nbd.stream import Stream
from qcow2.nbd.wire import DONE, Chunk

SMALL = 16 << 10  # bytes that are read and sent without a look at what they are
MAX_TEXT = 4096


class Replies:
    """Answers to the client of *stream* about *export*; for any number of threads."""

    def __init__(self, stream: Stream, export: Export, *, is_structured: bool) -> None:
        self._stream = stream
        self._export = export
        self._is_structured = is_structured

    def done(self, cookie: int) -> None:
        """The request has been done. Raises: ClientGone."""
        if self._is_structured:
            self._send(wire.CHUNK.pack(wire.STRUCTURED_REPLY_MAGIC, DONE, Chunk.NONE, cookie, 0))
        else:
            self._send(wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, cookie))

    def error(self, cookie: int, number: int | None, text: str) -> None:
        """It has not, because of the errno *number*. Raises: ClientGone."""
        error = wire.wire_error(number)
        if not self._is_structured:
            self._send(wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, error, cookie))
            return
        message = text.encode(errors="replace")[:MAX_TEXT]
        nbytes = 6 + len(message)
        magic = wire.STRUCTURED_REPLY_MAGIC
        self._send(wire.ERROR_CHUNK.pack(magic, DONE, Chunk.ERROR, cookie, nbytes, error, len(message)), message)

    def status(self, cookie: int, number: int, extents: list[tuple[int, int]], *, is_last: bool) -> None:
        """What context *number* tells: length and flags of each stretch. Raises: ClientGone."""
        content = wire.U32.pack(number) + b"".join(wire.EXTENT.pack(*extent) for extent in extents)
        flags = DONE if is_last else 0
        self._send(
            wire.CHUNK.pack(wire.STRUCTURED_REPLY_MAGIC, flags, Chunk.BLOCK_STATUS, cookie, len(content)), content
        )

    def read_whole(self, cookie: int, offset: int, memory: memoryview) -> None:
        """Fill *memory* from *offset* and send it in one piece.

        Raises: ClientGone; OSError, ImageError: nothing was sent.
        """
        self._export.read(offset, memory)
        self._send(self._header(cookie, offset, len(memory), DONE), memory)

    def read(self, cookie: int, offset: int, nbytes: int, memory: memoryview, before_wait: Callable[[], None]) -> None:
        """Send *nbytes* from *offset*, by way of *memory*, which may be less; *before_wait()* if that may take a while.

        Raises: ClientGone; OSError, ImageError: no end was sent.
        """
        if not self._is_structured:
            before_wait()
            self._read_simply(cookie, offset, nbytes, memory)
        elif 0 < nbytes <= SMALL:
            before_wait()
            self.read_whole(cookie, offset, memory[:nbytes])
        else:
            for start in range(offset, offset + nbytes, len(memory)):
                self._read_pieces(cookie, start, min(len(memory), offset + nbytes - start), memory, before_wait)
            self.done(cookie)

    def _read_simply(self, cookie: int, offset: int, nbytes: int, memory: memoryview) -> None:
        """Once the first part is sent nothing can say that another one cannot be read: that ends the connection."""
        part = memory[: min(nbytes, len(memory))]
        self._export.read(offset, part)
        with self._stream.sending:
            self._stream.send(wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, cookie), part)
            for start in range(offset + len(part), offset + nbytes, len(memory)):
                part = memory[: min(len(memory), offset + nbytes - start)]
                try:
                    self._export.read(start, part)
                except (OSError, ImageError, MemoryError):
                    self._stream.end()
                    raise ClientGone from None
                self._stream.send(part)

    def _read_pieces(
        self, cookie: int, offset: int, nbytes: int, memory: memoryview, before_wait: Callable[[], None]
    ) -> None:
        for piece in self._export.pieces(offset, nbytes):
            if piece.is_zero:
                magic, kind = wire.STRUCTURED_REPLY_MAGIC, Chunk.OFFSET_HOLE
                self._send(wire.HOLE_CHUNK.pack(magic, 0, kind, cookie, 12, offset, piece.nbytes))
            elif piece.file is not None and piece.nbytes > SMALL and not self._stream.is_encrypted:
                if not piece.is_at_hand():
                    before_wait()
                self._send_file(cookie, offset, piece, memory)
            else:
                before_wait()
                part = memory[: piece.nbytes]
                self._export.read(offset, part)
                self._send(self._header(cookie, offset, len(part), 0), part)
            offset += piece.nbytes

    def _send_file(self, cookie: int, offset: int, piece: Piece, memory: memoryview) -> None:
        """From the page cache; what the file does not have, the engine may know, or why it cannot be read."""
        assert piece.file is not None
        header = self._header(cookie, offset, piece.nbytes, 0)
        failure: OSError | ImageError | MemoryError | None = None
        with self._stream.sending:
            sent = self._stream.send_file(header, piece.file.fd, piece.host_offset, piece.nbytes)
            if sent < piece.nbytes:
                rest = memory[: piece.nbytes - sent]
                try:
                    self._export.read(offset + sent, rest)
                except (OSError, ImageError, MemoryError) as error:  # the chunk has a length, and is followed by it
                    rest = memoryview(ZEROS)[: len(rest)]
                    failure = error
                self._stream.send(rest)
        if failure is not None:
            raise failure

    def _header(self, cookie: int, offset: int, nbytes: int, flags: int) -> bytes:
        if not self._is_structured:
            return wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, cookie)
        kind = Chunk.OFFSET_DATA
        return wire.DATA_CHUNK.pack(wire.STRUCTURED_REPLY_MAGIC, flags, kind, cookie, nbytes + 8, offset)

    def _send(self, *pieces: bytes | memoryview) -> None:
        with self._stream.sending:
            self._stream.send(*pieces)
