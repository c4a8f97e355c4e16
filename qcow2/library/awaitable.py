"""The face of a disk for who has an event loop: each call runs on a thread of the loop's, in the disk's turn."""

from collections.abc import Callable
from importlib import import_module
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")


class AwaitableDisk:
    """What `Disk` can do, to be awaited."""

    read: Callable[[int, int], bytes]
    readinto: Callable[[int, bytearray | memoryview], None]
    write: Callable[[int, bytes | bytearray | memoryview], None]
    write_zeroes: Callable[..., None]
    discard: Callable[[int, int], None]
    flush: Callable[[], None]
    close: Callable[[], None]

    async def aread(self, offset: int, nbytes: int) -> bytes:
        """As `read`; the event loop goes on meanwhile. Calls of one disk take turns, in the order they were made."""
        return await _aside(self.read, offset, nbytes)

    async def areadinto(self, offset: int, buffer: bytearray | memoryview) -> None:
        """As `readinto`; who cancels it must not use *buffer* before the disk is closed."""
        await _aside(self.readinto, offset, buffer)

    async def awrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """As `write`; one that is cancelled may be written all the same."""
        await _aside(self.write, offset, data)

    async def awrite_zeroes(self, offset: int, nbytes: int, *, unmap: bool = True) -> None:
        """As `write_zeroes`."""
        await _aside(self.write_zeroes, offset, nbytes, unmap=unmap)

    async def adiscard(self, offset: int, nbytes: int) -> None:
        """As `discard`."""
        await _aside(self.discard, offset, nbytes)

    async def aflush(self) -> None:
        """As `flush`."""
        await _aside(self.flush)

    async def aclose(self) -> None:
        """As `close`."""
        await _aside(self.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


async def _aside(function: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """Call *function* on a thread of the event loop's. Who awaits this has loaded asyncio; nobody else needs it."""
    result: T = await import_module("asyncio").to_thread(function, *arguments, **named)
    return result
