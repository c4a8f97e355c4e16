"""The files of a worker, and the operations of the engine on them."""

from collections.abc import Callable, Sequence

from ring.native import Pointer, check, ffi, lib
from ring.operations import DATA, DESPITE, READ, WRITE, Done, Operations, Piece
from ring.trace import Trace

FILES_MAX: int = lib.WORKER_FILES  # of a worker


def look_at(fd: int, direct_fd: int = -1) -> Pointer:
    """What a worker has to know of a file; on any thread but its own, since a file may hang."""
    traits: Pointer = ffi.new("struct file_traits *")
    lib.worker_look_at(fd, direct_fd, traits)
    return traits


class Files:
    """The half of a `Worker` that an image asks for. All methods are for the worker thread."""

    _native: Pointer
    _operations: Operations

    def __init__(self) -> None:
        self._trace: Trace | None = None  # C writes to it
        self._on_sync_failed: dict[int, Callable[[int], None]] = {}

    def add_file(
        self,
        fd: int,
        *,
        direct_fd: int = -1,
        sync: bool = True,
        on_sync_failed: Callable[[int], None] | None = None,
        traits: Pointer | None = None,
    ) -> int:
        """Register a file and return its slot; the fds stay the caller's and must outlive the worker.

        *direct_fd* (O_DIRECT) serves `data` transfers and the extent map's where everything is aligned. With
        ``sync=False`` syncs succeed at once. *on_sync_failed(errno)* is told once, on the worker thread, if an
        fdatasync failed; from then on every write, zero and sync of the slot fails with EIO. *traits* are what
        `look_at` has found; without them this thread looks.
        """
        traits = look_at(fd, direct_fd) if traits is None else traits
        slot = check(lib.worker_add_file(self._native, fd, direct_fd, sync, traits), "file of the worker")
        if on_sync_failed is not None:
            self._on_sync_failed[slot] = on_sync_failed
        return slot

    def remove_file(self, slot: int) -> None:
        """Forget the file in *slot*, on which nothing is under way; its fds may be closed, the number used again."""
        lib.worker_remove_file(self._native, slot)
        self._on_sync_failed.pop(slot, None)

    def cut_file(self, slot: int, nbytes: int) -> None:
        """The caller is about to let the file in *slot* be no longer than *nbytes*."""
        lib.worker_cut_file(self._native, slot, nbytes)

    def set_trace(self, trace: Trace) -> None:
        """Record from now on what changes the files, what is synced and the requests for it; it outlives the worker."""
        self._trace = trace
        lib.worker_set_trace(self._native, trace.native)

    def read(self, slot: int, host_offset: int, pieces: Sequence[Piece], done: Done, *, data: bool = False) -> None:
        """Fill *pieces* one after the other, with zeros past the end of the file."""
        self._operations.transfer(READ | DATA * data, slot, host_offset, pieces, done)

    def write(self, slot: int, host_offset: int, pieces: Sequence[Piece], done: Done, *, data: bool = False) -> None:
        """Write *pieces* one after the other; their bytes must not change until *done*."""
        self._operations.transfer(WRITE | DATA * data, slot, host_offset, pieces, done)

    def write_despite(self, slot: int, host_offset: int, piece: Piece, done: Done) -> None:
        """Write *piece* though a sync of the file may have failed."""
        self._operations.transfer(WRITE | DESPITE, slot, host_offset, [piece], done)

    def write_at_once(self, slot: int, host_offset: int, pieces: Sequence[Piece], *, data: bool = False) -> bool:
        """Write *pieces* before this returns, if they are few bytes and the host does not make writers wait lately.

        False: use `write`, for all of it. Raises: OSError, how the write failed.
        """
        return self._operations.write_at_once(WRITE | DATA * data, slot, host_offset, pieces)

    def write_some(self, slot: int, parts: Sequence[tuple[int, bytes]]) -> tuple[int, int]:
        """Write the first of *parts*, host offset and bytes, before this returns -> how many; `write` the next.

        And errno if that one failed, 0 if it would wait.
        """
        return self._operations.write_some(slot, parts)

    def write_now(self, slot: int, host_offset: int, data: bytes) -> None:
        """Write *data*, a few bytes, before this returns, whatever the host does to writers. Raises: OSError."""
        self._operations.write_now(slot, host_offset, data)

    def zero(self, slot: int, host_offset: int, nbytes: int, done: Done) -> None:
        """Make the range read as zeros without changing the file's length; give its space back where possible."""
        self._operations.zero(slot, host_offset, nbytes, done)

    def sync(self, slot: int, done: Done) -> None:
        """Join the group commit: *done* after an fdatasync that started after now."""
        self._operations.sync(slot, done)

    def grace(self, done: Done) -> None:
        """*done* after everything in flight now is done: C's transfers and Python's reads, writes and zeros."""
        self._operations.grace(done)

    def is_near(self, slot: int) -> bool:
        """Whether the file in *slot* may be called on this thread: no network, no other process is in between."""
        return bool(lib.worker_is_near(self._native, slot))

    def _sync_failed(self, slot: int, errno: int) -> None:
        tell = self._on_sync_failed.get(slot)
        if tell is not None:
            tell(errno)
