"""Calls a function now and then, for what has to look at the time whether anything happens or not."""

import threading
from collections.abc import Callable

from ring.thread import start_deaf

TICK_SECONDS = 1.0


class Clock:
    """Calls *tick()* each second on a thread of its own, until it is closed or that raises RuntimeError."""

    def __init__(self, tick: Callable[[], None], seconds: float = TICK_SECONDS) -> None:
        """Raises: OSError if there is no thread to be had."""
        self._tick = tick
        self._seconds = seconds
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._main, name="clock", daemon=True)
        start_deaf(self._thread)

    def _main(self) -> None:
        while not self._is_closed.wait(self._seconds):
            try:
                self._tick()
            except RuntimeError:  # the worker has ended, and nobody asks
                return

    def close(self) -> None:
        """Tick no more."""
        self._is_closed.set()
        self._thread.join()
