"""Threads of drivers."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import TypeVar

T = TypeVar("T")

BLINK_SECONDS = 1.0
LOOK_SECONDS = 0.1


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


def interruptible(function: Callable[[], T], on_wait: Callable[[], None] | None, drop: Callable[[T], object]) -> T:
    """What *function* returns, called beside this thread, which looks meanwhile whether it is to go on waiting.

    The main thread hears signals, whose handlers may raise, and so may *on_wait()*, called now and then on any thread:
    nobody waits then, and *drop* gets the result. Where neither can happen it is called right here.
    Raises: what *function* does.
    """
    if on_wait is None and threading.current_thread() is not threading.main_thread():
        return function()
    from concurrent.futures import Future, wait

    def work() -> None:
        try:
            result.set_result(function())
        except BaseException as error:  # the waiter's
            result.set_exception(error)

    try:
        result: Future[T] = Future()
        start_quiet(threading.Thread(target=work, name="qcow2 compute", daemon=True))
    except RuntimeError:  # no thread to be had
        return function()
    try:
        while not wait([result], LOOK_SECONDS).done:
            if on_wait is not None:
                on_wait()
    except BaseException:
        result.add_done_callback(lambda ended: ended.exception() or drop(ended.result()))
        raise
    return result.result()
