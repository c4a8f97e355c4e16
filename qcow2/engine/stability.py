"""What an image promises about its host file: metadata writes, syncs, and the end of trust after one fails."""

import errno
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from qcow2.driver.operation import File, Sync, Write, WriteSome
from qcow2.engine.statistics import Statistics
from qcow2.error import NotTried
from qcow2.plane.space import lacks_space


def is_harmless(error: OSError) -> bool:
    """Whether a metadata write that failed with *error* has changed nothing.

    Nothing was tried, or space was lacking: it lies inside one cluster, nothing that depends on it has happened yet,
    and its caller leaves memory as it was.
    """
    return isinstance(error, NotTried) or lacks_space(error)


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
            raise OSError(errno.EIO, f"no more writes after: {self.error.strerror}", self.file.path)

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
