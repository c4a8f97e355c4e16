"""A limit on what coroutines of one scheduler do at a time: first come, first served."""

from collections import deque

from qcow2.driver.operation import Signal


class Turns:
    """`async with` it: at most *limit* are inside. For memory: who is inside never waits for who is not."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._waiting: deque[Signal] = deque()

    async def __aenter__(self) -> None:
        if self._free:
            self._free -= 1
            return
        turn = Signal()
        self._waiting.append(turn)
        await turn.wait()

    async def __aexit__(self, *exc_info: object) -> None:
        if self._waiting:
            self._waiting.popleft().set()
        else:
            self._free += 1
