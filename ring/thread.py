"""Threads beside the main one."""

import errno
import signal
import threading
from concurrent.futures import Future
from typing import Any

FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT}  # of the thread that has them


def start_deaf(thread: threading.Thread) -> None:
    """Start *thread*, and those that it will start, with all signals blocked.

    Python acts on a signal on the main thread, and the system call that this one sleeps in ends only if the kernel
    gives the signal to it. Any thread that does not block signals may be given them.
    Raises: OSError if there is no thread to be had.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - FAULTS)
    try:
        thread.start()
    except RuntimeError as error:  # as Python calls EAGAIN of a limit, and ENOMEM
        raise OSError(errno.EAGAIN, f"{error}: a limit on threads, processes or memory") from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def new_future() -> "Future[Any]":
    """A future. Raises: MemoryError, which Python calls a RuntimeError where its lock finds none."""
    try:
        return Future()
    except RuntimeError:
        raise MemoryError from None
