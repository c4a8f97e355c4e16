"""Whether storage answers, asked before anything is held that the guest or others wait for."""

import errno
import os
import threading
from contextlib import suppress

from ring.thread import start_deaf

PATIENCE_SECONDS = 10.0


class Probe:
    """Asks for files on threads of its own: at most one a file waits for storage that hangs."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[str, ...], threading.Thread] = {}

    def require_answer(self, beside: str, *names: str, patience: float = PATIENCE_SECONDS) -> None:
        """Return once the host says what the file *names* lead to is, or that none is.

        The first of them as seen from the directory of *beside*, each other one from that of the one before it.
        Raises: OSError if it does not within *patience* seconds, or if there is no thread to be had.
        """
        self._waiting = {key: thread for key, thread in self._waiting.items() if thread.is_alive()}
        thread = self._waiting.get((beside, *names))
        if thread is None:
            thread = threading.Thread(target=_ask, args=(beside, *names), name="probe", daemon=True)
            start_deaf(thread)
            self._waiting[beside, *names] = thread
        thread.join(patience)
        if thread.is_alive():
            raise OSError(errno.ETIMEDOUT, f"does not answer within {patience:g} s: does the storage hang?", names[-1])


def _ask(beside: str, *names: str) -> None:
    with suppress(OSError, ValueError):  # said by who opens it
        path = os.path.realpath(beside)
        for name in names:
            path = os.path.join(os.path.dirname(path), name)
        os.stat(path)
