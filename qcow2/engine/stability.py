"""What an image promises about its host file: metadata writes, syncs, and the end of trust after one fails."""

import errno
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

from qcow2.driver.operation import File, Sync, Write, WriteSome
from qcow2.engine.statistics import Statistics
from qcow2.error import NotTried
from qcow2.format.layout import SECTOR_SIZE
from qcow2.plane.space import lacks_space

PAGE = 4096  # bytes that a host finds room for together, or not at all


def is_harmless(error: OSError) -> bool:
    """Whether a metadata write that failed with *error* has changed nothing.

    Nothing was tried, or space was lacking: it lies inside one page (see `Stability.change`), or where nothing leads to
    yet, or its caller knows that a part may be written; and memory is left as it was.
    """
    return isinstance(error, NotTried) or lacks_space(error)


def _differing(host_offset: int, old: bytes, new: bytes) -> Iterator[slice]:
    """The parts of *new*, whole sectors of a page each, that differ from *old*; they lie at *host_offset*."""
    start = 0
    while start < len(new):
        stop = min(len(new), start + PAGE - (host_offset + start) % PAGE)
        if old[start:stop] != new[start:stop]:
            places = [slice(at, min(at + SECTOR_SIZE, stop)) for at in range(start, stop, SECTOR_SIZE)]
            changed = [place for place in places if old[place] != new[place]]
            yield slice(changed[0].start, changed[-1].stop)
        start = stop


async def _warn_nobody() -> None:
    """There is nothing to know."""


class Stability:
    """The gate through which every metadata write and sync of an image goes.

    After one of them has failed the image takes no more writes: what is on the disk is no longer known, and no later
    success may hide that. What was never tried has not failed, and a write that lacks space is harmless.
    """

    def __init__(
        self, file: File, statistics: Statistics, on_failure: Callable[[], None], data_file: File | None = None
    ) -> None:
        """*data_file*: another one, in which the data lies that the metadata leads to."""
        self.file = file
        self._data_file = None if data_file is file else data_file
        self.error: OSError | None = None
        self.warn_next: Callable[[], Coroutine[Any, Any, None]] = _warn_nobody  # that a sync failed: see `lose`
        self._statistics = statistics
        self._on_failure = on_failure

    def fail(self, error: OSError) -> None:
        """Take no more writes because of *error*; the first one is kept."""
        if self.error is None:
            self.error = error
            self._on_failure()

    async def lose(self, error: OSError) -> None:
        """`fail` because of *error*, with which a sync failed, and let the next process know.

        For the host what it could not write is as good as written: no later sync tries again, and what is read back
        is no longer what the disk holds.
        """
        self.fail(error)
        await self.warn_next()

    def require_trust(self) -> None:
        """Raises: OSError(EIO) once a metadata write or a sync has failed."""
        if self.error is not None:
            raise self._refusal(self.error)

    @property
    def failure(self) -> OSError | None:
        """What `require_trust` raises, if it does."""
        return None if self.error is None else self._refusal(self.error)

    def _refusal(self, error: OSError) -> OSError:
        return OSError(errno.EIO, f"no more writes after: {error.strerror}", self.file.path)

    async def write(self, host_offset: int, *pieces: bytes | bytearray | memoryview) -> None:
        """Write metadata; process-safe on return."""
        self.require_trust()
        self._statistics.metadata_writes += 1
        try:
            await Write(self.file, host_offset, *pieces)
        except OSError as error:
            if not is_harmless(error):
                self.fail(error)
            raise
        self.require_trust()

    async def change(
        self, host_offset: int, old: bytes, new: bytes, on_written: Callable[[slice], None] = lambda part: None
    ) -> None:
        """Let the metadata at *host_offset*, *old*, be *new*; process-safe on return. A page is written at a time.

        Raises: OSError; the parts that *on_written* was told of are new, for lack of space all others as they were.
        """
        for part in _differing(host_offset, old, new):
            await self.write(host_offset + part.start, new[part])
            on_written(part)

    async def write_some(self, parts: Sequence[tuple[int, bytes]]) -> int:
        """`write` the first of *parts*, host offset and bytes -> how many: one at least."""
        self.require_trust()
        try:
            count: int = await WriteSome(self.file, parts)
        except OSError as error:
            if not is_harmless(error):
                self.fail(error)
            raise
        if not count:
            await self.write(*parts[0])
            return 1
        self._statistics.metadata_writes += count
        self.require_trust()
        return count

    async def sync(self) -> None:
        """Make everything that has completed stable. Raises: OSError; the image may be written on if it is NotTried."""
        self.require_trust()
        self._statistics.syncs += 1
        try:
            if self._data_file is not None:
                await Sync(self._data_file)
            await Sync(self.file)
        except NotTried:
            raise
        except OSError as error:
            await self.lose(error)
            raise
        self.require_trust()
