"""Threads of drivers."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import TypeVar

T = TypeVar("T")

BLINK_SECONDS = 1.0


def start_quiet(thread: threading.Thread) -> None:
    """Start *thread* with all signals blocked: they are for threads that know what to do with them.

    Raises: RuntimeError if there is no thread to be had.
    """
    with undisturbed():
        thread.start()


@contextmanager
def undisturbed() -> Iterator[Callable[[], None]]:
    """No handler of a signal raises in this thread, until what this gives is called, or to the end of it."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def end() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # raises for one that came before
        yield end
    finally:
        end()


def take(queue: "SimpleQueue[T]") -> T:
    """The next of *queue*, waited for; a signal that comes just before that is heard soon, which is not Python's way.

    Its handler runs between two steps of the main thread, and a wait that has not begun is not interrupted.
    """
    while True:
        try:
            return queue.get(timeout=BLINK_SECONDS)
        except Empty:
            continue
