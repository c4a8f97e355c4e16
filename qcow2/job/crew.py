"""Pieces of a job side by side: few at a time, none left behind."""

from collections.abc import Coroutine
from typing import Any

from qcow2.driver.operation import Signal, Spawn
from qcow2.engine.turns import Turns


class Crew:
    """Runs pieces, at most *width* at a time. The first error of one ends the job: no piece is started after."""

    def __init__(self, width: int) -> None:
        self._turns = Turns(width)
        self._under_way: set[Signal] = set()
        self._error: BaseException | None = None

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
