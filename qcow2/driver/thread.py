"""Threads of drivers."""

import signal
import threading


def start_quiet(thread: threading.Thread) -> None:
    """Start *thread* with all signals blocked: they are for threads that know what to do with them.

    Raises: RuntimeError if there is no thread to be had.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
