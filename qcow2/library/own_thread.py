"""A thread of a disk's own: what runs there runs one after the other, and nothing breaks into it.

Python raises KeyboardInterrupt, and whatever a signal handler raises, between any two instructions of the main
thread. An engine that is left in the middle of a step is no engine any more. So the caller, on whichever thread,
waits; one that is interrupted still waits for the end of what it has begun, and raises then.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

from qcow2.job.pace import Pace

T = TypeVar("T")

LOOK_SECONDS = 0.5  # until a signal is seen that came right before the caller began to wait: it wakes nobody

_taking = threading.local()  # jobs: the queue that a thread is there for


class _Job:
    """One function under way; `wait` tells how it ended."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._functions = [function]  # until it is claimed
        self._is_done = False
        self._done = threading.Lock()
        self._done.acquire()
        self._result: Any = None
        self._error: BaseException | None = None

    def claim(self) -> Callable[[], Any] | None:
        """What to call, for the first who asks."""
        try:
            return self._functions.pop()
        except IndexError:
            return None

    def run(self) -> None:
        function = self.claim()
        if function is None:
            return
        try:
            self._result = function()
        except BaseException as error:  # its caller's
            self._error = error
        finally:
            del function  # a traceback may have this frame

    def end(self) -> None:
        """Let the caller go on."""
        self._is_done = True
        self._done.release()

    def wait(self, interrupted: Callable[[], None]) -> Any:
        interrupt: BaseException | None = None
        while not self._is_done:
            try:
                if interrupt is not None:
                    interrupted()
                self._done.acquire(timeout=LOOK_SECONDS)
            except BaseException as error:  # raised by a signal handler of the caller's, here or there
                interrupt = error
        failure, self._error = interrupt or self._error, None
        if failure is None:
            return self._result
        try:
            raise failure
        finally:
            del failure, interrupt  # whose traceback has this frame


class OwnThread:
    """Calls functions in turn; the thread starts with the first one. Without one they run in the caller."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._works = threading.RLock()  # held by the one thread that takes jobs, which does not wait for itself
        self._has_thread = False
        self._may_have_thread = False  # an interrupt keeps from us whether one has started
        self._is_stopped = False
        self._turn = threading.RLock()  # held by whoever is at it

    @property
    def is_ours(self) -> bool:
        """Not so in the child of a fork, which has no such thread."""
        return self._process == os.getpid()

    def call(self, function: Callable[[], T], interrupted: Callable[[], None] = lambda: None) -> T:
        """Return what *function* returns, raise what it raises; *interrupted* is called each time the caller is.

        What is called in a turn is a part of that.
        Raises: RuntimeError once the interpreter ends: no thread runs any more that could do it.
        """
        if sys.is_finalizing():
            raise RuntimeError("the interpreter ends: a disk was not closed before")
        if self._is_here or not self._can_start():
            with self._turn:
                return function()
        job = _Job(function)
        self._jobs.put(job)
        if self._is_stopped:  # perhaps after we looked: nobody may be left to take it
            self._run_what_is_left()
        result: T = job.wait(interrupted)
        return result

    def begin(self, function: Callable[[], None]) -> bool:
        """Have *function* called in its turn, which comes after what was called or begun before; raises nothing.

        Once it is stopped, or being so, or the interpreter ends: False, and *function* is not called. Never waits
        while there is a thread.
        Where none can start, and in the child of a fork, it has been called on return, and takes its turns itself.
        """
        if sys.is_finalizing():
            return False
        if not self.is_ours or self._is_here:
            function()
        elif self._can_start():
            job = _Job(function)
            self._jobs.put(job)
            return not self._is_stopped or job.claim() is None  # nobody may be left to take it
        elif self._is_stopped:
            return False
        else:
            function()
        return True

    @property
    def _is_here(self) -> bool:
        return getattr(_taking, "jobs", None) is self._jobs

    def _can_start(self) -> bool:
        """Whether there is a thread, by now."""
        if not self._has_thread and not self._is_stopped:
            self._has_thread = self._start()
        return self._has_thread

    def call_here(self, function: Callable[[], T]) -> T:
        """The same on the caller's thread. *function* leaves all as it was, wherever an interrupt breaks into it."""
        with self._turn:
            return function()

    def _start(self) -> bool:
        """Whether there is a thread now, which takes no signals. One too many, after an interrupt, ends at once.

        Its object may end with it: the callbacks of weak references to it would swallow an interrupt. So here, where
        none comes.
        """
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:  # what blocks them may raise for one that came before
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            self._may_have_thread = True
            threading.Thread(
                target=_work, args=(self._jobs, self._works, self._turn), name="qcow2 disk", daemon=True
            ).start()
        except RuntimeError:
            return False
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return True

    def stop(self) -> None:
        """End the thread after what was called; what is called later runs in the caller.

        An interpreter that ends lets no other thread run any more: nobody waits for one.
        """
        self._has_thread, self._is_stopped = False, True
        if self._may_have_thread and self.is_ours and not sys.is_finalizing():
            self._jobs.put(None)
            self._may_have_thread = False
            with self._works:  # it has ended
                pass
            self._jobs.put(None)  # for one that has yet to look

    def _run_what_is_left(self) -> None:
        """End the thread, if there is one, and do what it has not done."""
        self._has_thread = False
        self._jobs.put(None)
        with self._works:  # it has ended, and another one cannot begin
            while not self._jobs.empty():
                job = self._jobs.get()
                if job is not None:
                    _do(job, self._turn)
        self._jobs.put(None)  # for one that has yet to look


def undisturbed(function: Callable[[], T], pace: Pace) -> T:
    """Call *function*, a job at *pace*, on a thread of its own; an interrupt cancels it, and is raised when that ends.

    *function* writes to an image that is closed cleanly whatever happens.
    """
    thread = OwnThread()
    try:
        return thread.call(function, pace.cancel)
    except BaseException:  # perhaps an interrupt that came before we waited
        pace.cancel()
        raise
    finally:
        thread.stop()


def _do(job: _Job, turn: "threading.RLock") -> None:
    with turn:
        job.run()
    job.end()


def _work(jobs: "SimpleQueue[_Job | None]", works: "threading.RLock", turn: "threading.RLock") -> None:
    if not works.acquire(blocking=False):
        return
    _taking.jobs = jobs
    try:
        while (job := jobs.get()) is not None:
            _do(job, turn)
            del job  # and with it what it refers to
    finally:
        works.release()
