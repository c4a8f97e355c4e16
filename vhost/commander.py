"""A thread for what may take long of what clients ask the control socket for: the rest is answered meanwhile."""

import threading
from collections.abc import Callable
from queue import SimpleQueue

from ring.thread import start_deaf
from vhost.device import die


class Commander:
    """Does what it is given, one after the other, from `start` to `end`."""

    def __init__(self) -> None:
        self._given: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="commander", daemon=True)

    def start(self) -> None:
        """Raises: OSError if there is no thread to be had."""
        start_deaf(self._thread)

    def give(self, work: Callable[[], None]) -> None:
        """Let it be done once all that was given before is."""
        self._given.put(work)

    def wait(self) -> None:
        """Return once all that was given is done."""
        is_done = threading.Event()
        self.give(is_done.set)
        is_done.wait()

    def end(self) -> None:
        """The same, and do nothing any more."""
        self._given.put(None)
        self._thread.join()

    def _main(self) -> None:
        try:
            while (work := self._given.get()) is not None:
                work()
        except BaseException as error:  # a bug of ours: nobody would be answered any more
            die(error)
