"""What is taken back when what it was taken for fails."""

from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Rollback(Generic[T]):
    """A context: if an error ends it, `undo(what)` is awaited, and the error goes on.

    Host clusters that were allocated are freed so: nothing leads to them. *what* is as it is then, not as it was.
    """

    __slots__ = ("_undo", "_what")

    def __init__(self, undo: Callable[[T], Coroutine[Any, Any, None]], what: T) -> None:
        self._undo = undo
        self._what = what

    async def __aenter__(self) -> None:
        """Nothing is undone yet."""

    async def __aexit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None and issubclass(kind, Exception):  # a coroutine that is closed awaits nothing any more
            await self._undo(self._what)
