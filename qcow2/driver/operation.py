"""The closed set of operations the engine may await: its only way to the disk, to other cores and to waiting.

Each operation says what it guarantees when the await returns, not which system call it is. A driver
(`qcow2.driver`) makes it true; a failure arrives at the await as `OSError`. Awaiting an operation and
`Signal.wait` are the only places where a coroutine of the engine gives way to another one.
"""

from collections.abc import Callable, Coroutine, Generator, Sequence
from typing import Any, NamedTuple, NewType, Protocol

from qcow2.native import lib

SCRATCH_BYTES = 2 * lib.BETWEEN_PIECE
LARGEST_UNIT = lib.BETWEEN_PIECE  # bytes, of what is left out as zeros
GuestOffset = NewType("GuestOffset", int)  # bytes from the start of the virtual disk
HostOffset = NewType("HostOffset", int)  # bytes from the start of a file of the chain


class File(Protocol):
    """An open host file, opaque to the engine: a key for the driver and a name for messages."""

    @property
    def path(self) -> str: ...

    @property
    def writable(self) -> bool: ...


class Memory(Protocol):
    """Bytes that outlive the process and not the host, opaque to the engine: the place of the link log."""

    @property
    def path(self) -> str: ...

    @property
    def address(self) -> int:
        """Where the data plane may store to it once the engine has; 0 if it may not."""

    @property
    def is_lost(self) -> bool:
        """Whether the next process could not find it: somebody has removed it."""

    def reserve(self, nbytes: int) -> None:
        """Be so many bytes long, once it is made."""

    def window(self, offset: int) -> Any:
        """A pointer to what is there, to be stored to by any means; None: only by `Store`."""


class Buffer(Protocol):
    """A run of bytes that the engine moves but need not look at: guest memory, or a memoryview."""

    def __len__(self) -> int: ...

    def slice(self, start: int, nbytes: int) -> "Buffer":
        """Borrow *nbytes* of this buffer from *start*; no copy."""

    def load(self) -> bytes:
        """Copy the bytes out."""

    def store(self, data: bytes | bytearray | memoryview) -> None:
        """Copy *data*, exactly as long as the buffer, in."""

    def zero(self) -> None:
        """Fill with zeros."""


class Operation:
    """One thing the engine awaits; the value of the await is the operation's result."""

    __slots__ = ()

    def __await__(self) -> Generator["Operation", Any, Any]:
        return (yield self)


class Size(Operation):
    """The length of the file in bytes -> int."""

    __slots__ = ("file",)

    def __init__(self, file: File) -> None:
        self.file = file


class Allocated(Operation):
    """How many bytes the host has set aside for the file -> int; its length where the host does not tell."""

    __slots__ = ("file",)

    def __init__(self, file: File) -> None:
        self.file = file


class Occupied(Operation):
    """What the host has at *host_offset*, as far as that goes, *nbytes* at most -> (is_data, nbytes).

    What is no data reads as zeros. All is data where the host does not tell.
    """

    __slots__ = ("file", "host_offset", "nbytes")

    def __init__(self, file: File, host_offset: int, nbytes: int) -> None:
        self.file = file
        self.host_offset = host_offset
        self.nbytes = nbytes


class Read(Operation):
    """*nbytes* at *host_offset* -> bytes; what lies past the end of the file reads as zeros."""

    __slots__ = ("file", "host_offset", "nbytes")

    def __init__(self, file: File, host_offset: int, nbytes: int) -> None:
        self.file = file
        self.host_offset = host_offset
        self.nbytes = nbytes


class ReadInto(Operation):
    """Fill *target* from *host_offset*; what lies past the end of the file reads as zeros."""

    __slots__ = ("data", "file", "host_offset", "target")

    def __init__(self, file: File, host_offset: int, target: Buffer, *, data: bool = False) -> None:
        self.file = file
        self.host_offset = host_offset
        self.target = target
        self.data = data  # guest data: an O_DIRECT mode may bypass the page cache


class Write(Operation):
    """Put *pieces*, one after the other, at *host_offset*: process-safe on return, stable after the next Sync.

    After a power loss before that, any subset of its 512-byte sectors may be on the disk.
    """

    __slots__ = ("data", "file", "host_offset", "pieces")

    def __init__(
        self, file: File, host_offset: int, *pieces: bytes | bytearray | memoryview | Buffer, data: bool = False
    ) -> None:
        self.file = file
        self.host_offset = host_offset
        self.pieces: Sequence[bytes | bytearray | memoryview | Buffer] = pieces
        self.data = data  # guest data: an O_DIRECT mode may bypass the page cache


class WriteDespite(Write):
    """`Write`, though a sync of *file* may have failed: then no Sync of this process makes it stable."""

    __slots__ = ()


class WriteSome(Operation):
    """`Write` the first of *parts*, (host offset, bytes), before anything else happens -> how many.

    It may be none. The next one would wait, or found no space: a `Write` of it tells.
    Raises: OSError, how else the next one failed; how many came before it nobody knows.
    """

    __slots__ = ("file", "parts")

    def __init__(self, file: File, parts: Sequence[tuple[int, bytes]]) -> None:
        self.file = file
        self.parts = parts


class Zero(Operation):
    """Make *nbytes* at *host_offset* read as zeros; stable after the next Sync.

    Gives the space back where the host can. Does not change the length of the file; what is past its end reads as
    zeros already.
    """

    __slots__ = ("file", "host_offset", "nbytes")

    def __init__(self, file: File, host_offset: int, nbytes: int) -> None:
        self.file = file
        self.host_offset = host_offset
        self.nbytes = nbytes


class Resize(Operation):
    """Set the length of the file; new bytes read as zeros. Stable after the next Sync.

    With *reserve* the host sets space aside for the new bytes if it can do so without writing them. Raises: OSError;
    the length is as it was.
    """

    __slots__ = ("file", "nbytes", "reserve")

    def __init__(self, file: File, nbytes: int, *, reserve: bool = False) -> None:
        self.file = file
        self.nbytes = nbytes
        self.reserve = reserve


class Sync(Operation):
    """Everything written to the file before this await began is stable on return.

    Concurrent syncs may share one fdatasync, if that one *started* after the last of them was awaited.
    """

    __slots__ = ("file",)

    def __init__(self, file: File) -> None:
        self.file = file


class Mark(NamedTuple):
    """Bytes of a file, within one sector."""

    file: File
    host_offset: int
    data: bytes


class Store(Operation):
    """Put each part, (offset, bytes), into *memory*: process-safe on return, gone after a power loss.

    Then *mark*, if there is one, into its file: process-safe, stable after the next Sync. All of that before anything
    else happens: stores are never reordered. A death in the middle may keep a part of it. A failure calls *undo*, also
    before anything else happens.
    """

    __slots__ = ("mark", "memory", "parts", "undo")

    def __init__(
        self,
        memory: Memory,
        *parts: tuple[int, bytes],
        mark: Mark | None = None,
        undo: Callable[[], None] = lambda: None,
    ) -> None:
        self.memory = memory
        self.parts = parts
        self.mark = mark
        self.undo = undo


class Grace(Operation):
    """Every transfer that was in flight when this await began, the data plane's included, is done."""

    __slots__ = ()


class Compute(Operation):
    """The result of *function*, a pure function that releases the GIL; a driver may run it on another core."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function


class CopyRange(Operation):
    """Have the host copy *nbytes* of *file* to another one, where it may share them -> whether it could.

    If not, a part of them may be there. Only files of the host can be given. Stable after the next Sync of *target*.
    """

    __slots__ = ("file", "host_offset", "nbytes", "target", "target_offset")

    def __init__(self, file: File, host_offset: int, target: File, target_offset: int, nbytes: int) -> None:
        self.file = file
        self.host_offset = host_offset
        self.target = target
        self.target_offset = target_offset
        self.nbytes = nbytes


Pairs = Sequence[tuple[int, int, int]]  # stretches of two files that go together: (offset, offset in the other, bytes)


class CopyData(Operation):
    """Copy *pairs* of *file* to another one but for zeros, in units of *unit* bytes, which divides `LARGEST_UNIT`.

    -> of each pair what was no zeros, as [(start, end)] counted from its front. Through *scratch*, memory of
    `SCRATCH_BYTES`; only files of the host can be given. An error leaves a part of them there. Stable after the next
    Sync of *target*.
    """

    __slots__ = ("file", "pairs", "scratch", "target", "unit")

    def __init__(self, file: File, target: File, pairs: Pairs, unit: int, scratch: memoryview) -> None:
        self.file = file
        self.target = target
        self.pairs = pairs
        self.unit = unit
        self.scratch = scratch


class Equal(Operation):
    """How many bytes of *pairs* of two files are equal, from the front on, in sectors; what lies past an end is zeros.

    The pairs count as one stretch. Through *scratch*, memory of `SCRATCH_BYTES`; only files of the host can be given.
    """

    __slots__ = ("file", "other", "pairs", "scratch")

    def __init__(self, file: File, other: File, pairs: Pairs, scratch: memoryview) -> None:
        self.file = file
        self.other = other
        self.pairs = pairs
        self.scratch = scratch


class Together(Operation):
    """Each of *operations*, one after the other, then the result of *function*, as of `Compute`.

    None comes after one that fails. A driver with threads does all of it on one.
    """

    __slots__ = ("function", "operations")

    def __init__(self, operations: Sequence[ReadInto | Write], function: Callable[[], Any] = lambda: None) -> None:
        self.operations = operations
        self.function = function


class Spawn(Operation):
    """Start *coroutine* as a task of its own beside the caller; returns at once.

    The coroutine ends its own errors: one that leaves it is a bug of ours and ends the process.
    """

    __slots__ = ("coroutine",)

    def __init__(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self.coroutine = coroutine


class Wait(Operation):
    """Until *signal* is set; used through `Signal.wait`."""

    __slots__ = ("signal",)

    def __init__(self, signal: "Signal") -> None:
        self.signal = signal


class Signal:
    """A one-shot event between coroutines of one scheduler."""

    __slots__ = ("is_set", "waiters")

    def __init__(self) -> None:
        self.is_set = False
        self.waiters: list[Callable[[], None]] = []  # filled by the scheduler

    async def wait(self) -> None:
        """Return once the signal is set; at once if it is."""
        if not self.is_set:
            await Wait(self)

    def set(self) -> None:
        """Let every waiter go on, in the order they came."""
        self.is_set = True
        waiters, self.waiters = self.waiters, []
        for wake in waiters:
            wake()


async def give_way() -> None:
    """Let others on this thread have a turn, if there are any."""
    await Compute(_nothing)


def _nothing() -> None:
    """Takes no time."""
