"""Pieces of a job side by side: few at a time, none left behind."""

from collections.abc import Coroutine
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from types import TracebackType
from typing import Any

from qcow2.driver.operation import Signal, Spawn
from qcow2.engine.turns import Turns
from qcow2.format.layout import MAX_CLUSTER_SIZE

WIDTH = 8  # pieces at a time, each with a thread of the host's
WINDOW = MAX_CLUSTER_SIZE  # bytes
BESIDE_A_GUEST = (4, 512 << 10)  # the same where requests are not to wait for long


class Crew:
    """Runs pieces, at most *width* at a time. The first error of one ends the job: no piece is started after.

    An async context manager: leaving it waits for all pieces, and raises the first error of one, unless it is left by
    another error: whoever is told that the job has ended may rely on that.
    """

    def __init__(self, width: int) -> None:
        self._turns = Turns(width)
        self._under_way: set[Signal] = set()
        self._error: BaseException | None = None

    async def __aenter__(self) -> "Crew":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._under_way:
            await next(iter(self._under_way)).wait()
        if error is None:
            await self.join()

    async def start(self, piece: Coroutine[Any, Any, None]) -> None:
        """Begin *piece* as soon as there is a place.

        Raises: what another piece has raised; this one is not begun then.
        """
        await self._turns.__aenter__()
        if self._error is not None:
            piece.close()
            await self._turns.__aexit__()
            await self.join()
        ended = Signal()
        self._under_way.add(ended)
        await Spawn(self._run(piece, ended))

    async def _run(self, piece: Coroutine[Any, Any, None], ended: Signal) -> None:
        try:
            await piece
        except BaseException as error:  # raised where the pieces are joined
            self._error = self._error or error
        finally:
            self._under_way.discard(ended)
            ended.set()
            await self._turns.__aexit__()

    async def join(self) -> None:
        """Return when all have ended.

        Raises: the first error of one.
        """
        while self._under_way:
            await next(iter(self._under_way)).wait()
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # whose traceback has this frame


class Turn:
    """A piece's place in an `Order`; a context that gives way to the next one, at its end at the latest."""

    def __init__(self, before: Signal) -> None:
        self._before = before
        self.passed = Signal()

    def __enter__(self) -> None:
        """The piece has begun."""

    def __exit__(self, *exc_info: object) -> None:
        self.passed.set()

    async def come(self) -> None:
        """Return once all pieces before have given way."""
        await self._before.wait()

    def give_way(self) -> None:
        """Let the next one come."""
        self.passed.set()


class Order:
    """Lets pieces that are side by side do one thing one after the other, in the order in which they were begun.

    So what comes later on the disk comes later in the file.
    """

    def __init__(self) -> None:
        self._last = Signal()
        self._last.set()

    def next(self) -> Turn:
        """The turn of a piece that begins now."""
        turn = Turn(self._last)
        self._last = turn.passed
        return turn


class Buffers:
    """Memory for pieces, *nbytes* each; as many as there are at a time. What of it nobody touches takes no memory."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._unused: list[memoryview] = []

    def take(self) -> memoryview:
        """One for a piece, which gives it back if it comes to a good end."""
        return self._unused.pop() if self._unused else memoryview(mmap(-1, self._nbytes, MAP_PRIVATE | MAP_ANONYMOUS))

    def give(self, buffer: memoryview) -> None:
        """Nobody uses *buffer* now."""
        self._unused.append(buffer)


class Windows(Crew):
    """A crew whose pieces are stretches of a disk, *nbytes* long at most, each with memory of its own, in an order."""

    def __init__(self, width: int = WIDTH, nbytes: int = WINDOW) -> None:
        super().__init__(width)
        self.nbytes = nbytes
        self.buffers = Buffers(nbytes)
        self.order = Order()

    def widen(self, unit: int) -> None:
        """Before the first piece: let each begin and end with whole units of *unit* bytes, and be one at least."""
        self.nbytes = max(self.nbytes, unit)
        self.buffers = Buffers(self.nbytes + unit)
