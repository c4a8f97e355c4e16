"""The face of a disk for who has an event loop: each call is done on the disk's own thread, in its turn."""

from collections.abc import Callable, Coroutine
from functools import partial
from importlib import import_module
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

from qcow2.library.own_thread import OwnThread

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
    _path: str
    _thread: OwnThread

    def aread(self, offset: int, nbytes: int) -> Coroutine[Any, Any, bytes]:
        """As `read`; the event loop goes on meanwhile. Calls of one disk take turns, in the order they were made.

        A call is made here, whenever it is awaited: what it raises is raised there.
        """
        return self._begin(lambda: self.read(offset, nbytes))

    def areadinto(self, offset: int, buffer: bytearray | memoryview) -> Coroutine[Any, Any, None]:
        """As `readinto`; who cancels it must not use *buffer* before the disk is closed."""
        return self._begin(lambda: self.readinto(offset, buffer))

    def awrite(self, offset: int, data: bytes | bytearray | memoryview) -> Coroutine[Any, Any, None]:
        """As `write`; one that is cancelled is written all the same."""
        return self._begin(lambda: self.write(offset, data))

    def awrite_zeroes(self, offset: int, nbytes: int, *, unmap: bool = True) -> Coroutine[Any, Any, None]:
        """As `write_zeroes`."""
        return self._begin(lambda: self.write_zeroes(offset, nbytes, unmap=unmap))

    def adiscard(self, offset: int, nbytes: int) -> Coroutine[Any, Any, None]:
        """As `discard`."""
        return self._begin(lambda: self.discard(offset, nbytes))

    def aflush(self) -> Coroutine[Any, Any, None]:
        """As `flush`."""
        return self._begin(lambda: self.flush())

    def aclose(self) -> Coroutine[Any, Any, None]:
        """As `close`."""
        return self._begin(lambda: self.close(), lambda: self.close())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def _begin(self, function: Callable[[], T], once_closed: Callable[[], T] | None = None) -> Coroutine[Any, Any, T]:
        """Have *function* called in its turn, cancelled or not -> how it ends, to be awaited.

        Of a disk that is closed, or being closed, *once_closed* is called here instead.
        """
        future: Any = import_module("concurrent.futures").Future()
        future.set_running_or_notify_cancel()
        if not self._thread.begin(partial(_settle, future, function)):  # no frame: see there
            _settle(future, once_closed or self._refuse_closed)
        return _end_of(future)

    def _refuse_closed(self) -> NoReturn:
        raise ValueError(f"{self._path}: the disk is closed")


def _settle(future: Any, function: Callable[[], Any]) -> None:
    try:
        future.set_result(function())
    except BaseException as error:  # of who awaits it
        future.set_exception(error)
        del future  # whose exception has this frame


async def _end_of(future: Any) -> Any:
    """Who awaits this has loaded asyncio; nobody else needs it."""
    try:
        return await import_module("asyncio").wrap_future(future)
    finally:
        del future  # as above
