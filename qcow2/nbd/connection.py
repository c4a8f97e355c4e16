"""The second half of a connection: requests, each answered by the thread that received it.

One thread at a time waits for the client. The one that has received a request lets the next one wait, then does what
was asked and answers: so requests of one client run side by side, and need no queue between threads. Where nothing has
to be waited for, a read that is in the page cache, it answers first: there is nothing to gain from another thread.
"""

import errno
import threading
from collections.abc import Callable
from typing import NamedTuple

from qcow2.error import ImageError
from qcow2.nbd import wire
from qcow2.nbd.error import ClientGone, ProtocolViolation
from qcow2.nbd.export import MAX_EXTENTS, MAX_REQUEST, Export
from qcow2.nbd.negotiation import Agreement
from qcow2.nbd.reply import Replies
from qcow2.nbd.stream import Stream
from qcow2.nbd.wire import Command, CommandFlag

MAX_THREADS = 16  # of one client
STEP = 1 << 20  # bytes of memory that a request has for data


class Request(NamedTuple):
    """What a client asks for."""

    flags: int
    command: int
    cookie: int
    offset: int
    nbytes: int


class _Turn:
    """A thread's turn to receive; it may be kept for the next request."""

    def __init__(self, receiving: threading.Lock, call_next: Callable[[], None]) -> None:
        self._receiving = receiving
        self._call_next = call_next
        self.is_ours = False

    def take(self) -> None:
        """Wait for it, if it is not ours."""
        if not self.is_ours:
            self._receiving.acquire()
            self.is_ours = True

    def pass_on(self) -> None:
        """Let somebody else receive; what comes next may take a while."""
        if self.is_ours:
            self._call_next()
            self.end()

    def end(self) -> None:
        """Give it back."""
        if self.is_ours:
            self.is_ours = False
            self._receiving.release()


class Connection:
    """The client of *stream*, which uses *export* as *agreed*; *start(function)* runs one on a thread of its own."""

    def __init__(
        self, stream: Stream, export: Export, agreed: Agreement, start: Callable[[Callable[[], None]], bool]
    ) -> None:
        self._stream = stream
        self._export = export
        self._contexts = [(number, export.contexts[number]) for number in agreed.contexts]
        self._replies = Replies(stream, export, is_structured=agreed.is_structured)
        self._start = start
        self._receiving = threading.Lock()
        self._has_ended = False  # nothing more is received
        self._failure: Exception | None = None
        self._counts = threading.Condition()
        self._nthreads = 1
        self._nwaiting = 0  # for their turn to receive

    def serve(self) -> None:
        """Answer until the client leaves and all is answered. Raises: ProtocolViolation, or what a fault of ours is."""
        self._work()
        with self._counts:
            while self._nthreads:
                self._counts.wait()
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        """What each thread does; it ends with the connection."""
        memory = bytearray()
        turn = _Turn(self._receiving, self._call_next)
        try:
            while True:
                self._wait_for(turn)
                if self._has_ended:
                    break
                request = self._next_request()
                if len(memory) < STEP and request.command in (Command.READ, Command.WRITE, Command.CACHE):
                    memory = _more(memory, request.nbytes)
                refusal = None
                if request.command == Command.WRITE:
                    refusal = self._take_in(request, memoryview(memory))
                if request.command != Command.READ:
                    turn.pass_on()
                self._answer(request, memoryview(memory), refusal, turn)
        except ClientGone:
            self.stop()
        except Exception as failure:  # a violation of the client's, or a fault of ours
            self._failure = self._failure or failure
            self.stop()
        finally:
            turn.end()
            with self._counts:
                self._nthreads -= 1
                self._counts.notify_all()

    def _wait_for(self, turn: _Turn) -> None:
        if turn.is_ours:
            return
        with self._counts:
            self._nwaiting += 1
        turn.take()
        with self._counts:
            self._nwaiting -= 1

    def stop(self) -> None:
        """Receive no more; what was received is answered still."""
        self._has_ended = True
        self._stream.end_receiving()

    def _call_next(self) -> None:
        """See to it that somebody waits for the client while this request is answered."""
        with self._counts:
            if self._nwaiting or self._nthreads == MAX_THREADS or self._has_ended:
                return
            self._nthreads += 1
        if not self._start(self._work):  # a limit on threads: the client waits a little
            with self._counts:
                self._nthreads -= 1

    def _next_request(self) -> Request:
        magic, flags, command, cookie, offset, nbytes = wire.REQUEST.unpack(self._stream.receive(wire.REQUEST.size))
        if magic != wire.REQUEST_MAGIC:
            raise ProtocolViolation(f"request magic {magic:#x}")
        if command == Command.DISC:
            self._has_ended = True
            raise ClientGone
        if command == Command.WRITE and nbytes > MAX_REQUEST:
            raise ProtocolViolation(f"a WRITE of {nbytes} bytes, limit {MAX_REQUEST}")
        return Request(flags, command, cookie, offset, nbytes)

    def _take_in(self, request: Request, memory: memoryview) -> OSError | ImageError | None:
        """Receive what a WRITE brings; all but its last STEP is written by then. -> why the rest need not be."""
        refusal: OSError | ImageError | None = None
        try:
            self._require_sense(request)
        except OSError as error:
            refusal = error
        done = 0
        while True:
            part = memory[: min(STEP, request.nbytes - done)]
            self._stream.receive_into(part)
            if done + len(part) == request.nbytes:
                return refusal
            if refusal is None:
                refusal = self._try_to_write(request.offset + done, part)
            done += len(part)

    def _try_to_write(self, offset: int, part: memoryview) -> OSError | ImageError | None:
        try:
            self._export.write(offset, part)
        except (OSError, ImageError) as error:
            return error
        return None

    def _answer(self, request: Request, memory: memoryview, refusal: OSError | ImageError | None, turn: _Turn) -> None:
        """Do what is asked for, and say so. Raises: ClientGone."""
        try:
            if refusal is not None:
                raise refusal
            self._require_sense(request)
            if request.command == Command.READ:
                self._read(request, memory, turn)
            else:
                self._do(request, memory)
        except OSError as error:
            self._replies.error(request.cookie, error.errno, error.strerror or str(error))
        except ImageError as error:
            self._replies.error(request.cookie, errno.EIO, str(error))
        except MemoryError:
            self._replies.error(request.cookie, errno.ENOMEM, "out of memory")

    def _require_sense(self, request: Request) -> None:
        """Raises: OSError for what cannot be asked for here."""
        allowed = wire.FLAGS_OF.get(request.command)
        if allowed is None:
            raise OSError(errno.EINVAL, f"command {request.command} is not known")
        if request.flags & ~allowed:
            raise OSError(errno.EINVAL, f"flags {request.flags:#x} of command {request.command}, known {allowed:#x}")
        writes = request.command in (Command.WRITE, Command.WRITE_ZEROES, Command.TRIM)
        if writes and self._export.read_only:
            raise OSError(errno.EPERM, "the export is read-only")
        if request.command == Command.FLUSH:
            return
        if request.offset + request.nbytes > self._export.size:
            number = errno.ENOSPC if writes and request.command != Command.TRIM else errno.EINVAL
            text = f"{request.nbytes} bytes at {request.offset} are not inside the disk of {self._export.size} bytes"
            raise OSError(number, text)

    def _do(self, request: Request, memory: memoryview) -> None:
        export, offset, nbytes = self._export, request.offset, request.nbytes
        match request.command:
            case Command.BLOCK_STATUS:
                self._tell_status(request)
                return
            case Command.WRITE:
                part = memory[: STEP - -nbytes % STEP if nbytes else 0]  # the last, or all of it
                export.write(offset + nbytes - len(part), part)
                self._make_stable(request)
            case Command.WRITE_ZEROES:
                if request.flags & CommandFlag.FAST_ZERO and not export.zeroes_fast:
                    raise OSError(errno.EOPNOTSUPP, "zeroing is no faster than writing")
                export.write_zeroes(offset, nbytes, may_unmap=not request.flags & CommandFlag.NO_HOLE)
                self._make_stable(request)
            case Command.TRIM:
                export.trim(offset, nbytes)
                self._make_stable(request)
            case Command.FLUSH:
                export.flush()
            case Command.CACHE:
                self._cache(offset, nbytes, memory)
        self._replies.done(request.cookie)

    def _make_stable(self, request: Request) -> None:
        if request.flags & CommandFlag.FUA or self._export.is_writethrough:
            self._export.flush()

    def _read(self, request: Request, memory: memoryview, turn: _Turn) -> None:
        if request.nbytes > MAX_REQUEST:
            raise OSError(errno.EINVAL, f"a READ of {request.nbytes} bytes, limit {MAX_REQUEST}")
        if request.flags & CommandFlag.DF and request.nbytes:
            if request.nbytes > STEP:
                raise OSError(errno.EOVERFLOW, f"a READ of {request.nbytes} bytes in one piece, limit {STEP}")
            turn.pass_on()
            self._replies.read_whole(request.cookie, request.offset, memory[: request.nbytes])
        else:
            self._replies.read(request.cookie, request.offset, request.nbytes, memory, turn.pass_on)

    def _tell_status(self, request: Request) -> None:
        if not self._contexts:
            raise OSError(errno.EINVAL, "no context was agreed on")
        if not request.nbytes:
            raise OSError(errno.EINVAL, "the status of no bytes")
        limit = 1 if request.flags & CommandFlag.REQ_ONE else MAX_EXTENTS
        for number, context in self._contexts:
            found = context.statuses(request.offset, request.nbytes, limit)
            self._replies.status(request.cookie, number, found, is_last=number == self._contexts[-1][0])

    def _cache(self, offset: int, nbytes: int, memory: memoryview) -> None:
        """Have the host read it."""
        for start in range(offset, offset + nbytes, STEP):
            if self._has_ended:
                raise ClientGone
            self._export.read(start, memory[: min(STEP, offset + nbytes - start)])


def _more(memory: bytearray, nbytes: int) -> bytearray:
    """Memory for *nbytes*, STEP at most: *memory* if it will do."""
    wanted = min(STEP, nbytes)
    return memory if len(memory) >= max(wanted, 1) else bytearray(min(STEP, 1 << max(16, (wanted - 1).bit_length())))
