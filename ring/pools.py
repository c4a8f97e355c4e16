"""What a worker does beside its thread: computations, and calls that may hang."""

import errno
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import TypeVar

from ring.host import Host
from ring.thread import new_future

T = TypeVar("T")
Outcome = Callable[[T | None, BaseException | None], None]  # called on the worker thread

POOL_THREADS = 2


class Pools:
    """Two of them, so that what hangs holds up no computation. For the worker thread, but where a method says so."""

    def __init__(self, host: Host, wake: Callable[[], None], post: Callable[[Callable[[], None]], None]) -> None:
        """*wake* lets the worker thread call `deliver`, from any thread; *post* is that of the worker."""
        self._wake = wake
        self._post = post
        self._compute = host.pool(POOL_THREADS, "compute")
        self._host = host.pool(POOL_THREADS, "host")
        self._ended: deque[Callable[[], None]] = deque()
        self._told: deque[Callable[[], None]] = deque()
        self.under_way = 0

    def compute(self, function: Callable[[], T], done: Outcome[T]) -> None:
        """Run *function* on a pool thread, or here without one, then *done(result, error)*."""
        self._run_in(self._compute, function, done, _computed)

    def call_host(self, function: Callable[[], T], done: Outcome[T]) -> None:
        """The same for one that may hang, and holds up no computation; without a thread it fails with EAGAIN."""
        self._run_in(self._host, function, done, _refused)

    def _run_in(
        self,
        pool: Executor,
        function: Callable[[], T],
        done: Outcome[T],
        without_thread: "Callable[[Callable[[], T]], Future[T]]",
    ) -> None:
        future: Future[T] = new_future()
        try:
            pool.submit(partial(_run, future, function))
        except (RuntimeError, MemoryError):  # no thread to be had, but it is queued for one that comes later
            if future.cancel():
                future = without_thread(function)
        self.await_future(future, done)

    def await_future(self, future: "Future[T]", done: Outcome[T]) -> None:
        """*done(result, error)* once *future* is set, which any thread may do and one will."""
        self.under_way += 1
        future.add_done_callback(lambda future: self._end(future, done))

    def _end(self, future: Future[T], done: Outcome[T]) -> None:
        error = future.exception()
        result = future.result() if error is None else None
        self._ended.append(lambda: done(result, error))
        self._wake()

    def tell(self, function: Callable[[], None]) -> None:
        """As *post*, and also while the worker thread waits for what is under way, which may wait for this."""
        self._told.append(function)
        self._post(self._hear)  # and wakes it; what is posted later comes later

    def _hear(self) -> None:
        while self._told:
            self._told.popleft()()

    def deliver(self) -> None:
        """Run what was told, and tell those whose function has ended."""
        self._hear()
        while self._ended:
            self._ended.popleft()()
            self.under_way -= 1

    def close(self) -> None:
        """Nothing is under way."""
        self._compute.shutdown()
        self._host.shutdown()


def _run(future: "Future[T]", function: Callable[[], T]) -> None:
    """What a pool does, but for work that was cancelled: a resize of a file, done late, would cut it off."""
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function())
        except BaseException as error:  # as a pool does
            future.set_exception(error)


def _refused(_: Callable[[], T]) -> "Future[T]":
    future: Future[T] = new_future()
    future.set_exception(OSError(errno.EAGAIN, "no thread to be had for a file that may hang"))
    return future


def _computed(function: Callable[[], T]) -> "Future[T]":
    future: Future[T] = new_future()
    try:
        future.set_result(function())
    except Exception as error:  # as a pool does
        future.set_exception(error)
    return future
