"""Shared driver: threads run coroutines of one engine side by side, each performing the operations of its own.

The engine is stepped under a lock, by whichever thread has something to tell it. An operation that may take a while is
performed outside that lock, by the thread whose coroutine awaits it: nobody waits for another thread to wake up. What
the engine spawned belongs to no caller; a few threads of the driver's perform that.
"""

import errno
import os
import sys
import threading
import traceback
from collections.abc import Coroutine
from queue import SimpleQueue
from typing import Any, TypeVar

from qcow2.driver import operation as op
from qcow2.driver.file import go_on, outcome
from qcow2.driver.task import Scheduler, Task
from qcow2.driver.thread import start_quiet

T = TypeVar("T")

NHELPERS = 12  # more than the reaper punches holes at a time: somebody may wait for what else is spawned
NO_TRANSFERS = (op.Sync, op.Compute)  # and may take long: no Grace waits for them
AT_ONCE = (op.Store, op.Size, op.Allocated, op.WriteSome)  # a Store is done before anything else happens


class _Seat:
    """Where a thread waits for the next thing to do for its coroutine."""

    __slots__ = ("operation", "task", "turn")

    def __init__(self) -> None:
        self.turn = threading.Lock()  # released when there is something to do
        self.turn.acquire()
        self.task: Task | None = None
        self.operation: op.Operation | None = None

    def end(self, task: Task) -> None:
        self.task, self.operation = task, None
        self.turn.release()


class SharedDriver:
    """Runs coroutines of the engine for any number of threads."""

    def __init__(self) -> None:
        """Raises: OSError if there is no thread to be had; later on one will do."""
        self._lock = threading.Lock()  # of the scheduler, and with it of the engine
        self._idle = threading.Condition(self._lock)
        self._scheduler = Scheduler(self._start)
        self._seats: dict[Task, _Seat] = {}
        self._under_way: set[Task] = set()  # whose operation is being performed
        self._transfers: set[Task] = set()  # of those, what a Grace waits for
        self._syncs: dict[op.File, list[Task]] = {}  # for each file that is being synced: who waits for the next one
        self._joined: dict[Task, list[Task]] = {}  # who is served by the sync that a task performs
        self._graces: list[tuple[Task, set[Task]]] = []  # each waits for the transfers that it found under way
        self._work: SimpleQueue[tuple[Task, op.Operation] | None] = SimpleQueue()
        self._helpers: list[threading.Thread] = []
        self._start_helper()
        if not self._helpers:
            raise OSError(errno.EAGAIN, "cannot start a thread")

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Return the result of *coroutine*, raise what it raises; what it spawned may go on."""
        seat = _Seat()
        with self._lock:
            self._seats[self._scheduler.spawn(coroutine, seat.end)] = seat
            self._step()
        while True:
            seat.turn.acquire()
            operation, task = seat.operation, seat.task
            if operation is None:
                break
            assert task is not None
            self._perform(task, operation)
        assert task is not None
        with self._lock:
            del self._seats[task]
        error = task.take_error()
        if error is not None:
            try:
                raise error
            finally:
                del error  # whose traceback has this frame
        result: T = task.result
        return result

    def _step(self) -> None:
        try:
            self._scheduler.run()
        except BaseException as error:  # of what was spawned, which ends its own errors: a bug of ours, or no memory
            _die(error)

    def _start(self, task: Task, operation: op.Operation) -> None:
        """Have *operation* performed by whoever has *task*; under the lock."""
        if isinstance(operation, AT_ONCE):
            go_on(self._scheduler, task, *outcome(operation))
            return
        if isinstance(operation, op.Grace):
            self._begin_grace(task)
            return
        if isinstance(operation, op.Sync):
            self._begin_sync(task, operation)
        else:
            self._hand_out(task, operation)

    def _hand_out(self, task: Task, operation: op.Operation) -> None:
        self._under_way.add(task)
        if not isinstance(operation, NO_TRANSFERS):
            self._transfers.add(task)
        seat = self._seats.get(task)
        if seat is not None:
            seat.task, seat.operation = task, operation
            seat.turn.release()
        else:
            if len(self._helpers) < NHELPERS:
                self._start_helper()
            self._work.put((task, operation))

    def _begin_sync(self, task: Task, operation: op.Sync) -> None:
        """One that is under way began too early to serve *task*; all who come during it share the next."""
        if operation.file in self._syncs:
            self._syncs[operation.file].append(task)
        else:
            self._syncs[operation.file] = []
            self._hand_out(task, operation)

    def _end_sync(self, task: Task, operation: op.Sync, error: BaseException | None) -> None:
        for joined in self._joined.pop(task, ()):
            go_on(self._scheduler, joined, None, error)
        waiting = self._syncs.pop(operation.file)
        if waiting:
            self._syncs[operation.file] = []
            self._joined[waiting[0]] = waiting[1:]
            self._hand_out(waiting[0], operation)

    def _begin_grace(self, task: Task) -> None:
        if self._transfers:
            self._graces.append((task, set(self._transfers)))
        else:
            self._scheduler.resume(task)

    def _perform(self, task: Task, operation: op.Operation) -> None:
        value, error = outcome(operation)
        with self._lock:
            self._under_way.discard(task)
            self._transfers.discard(task)
            go_on(self._scheduler, task, value, error)
            if self._graces:
                self._end_graces(task)
            if isinstance(operation, op.Sync):
                self._end_sync(task, operation, error)
            self._step()
            if not self._under_way:
                self._idle.notify_all()

    def _end_graces(self, task: Task) -> None:
        waiting, self._graces = self._graces, []
        for grace, transfers in waiting:
            transfers.discard(task)
            if transfers:
                self._graces.append((grace, transfers))
            else:
                self._scheduler.resume(grace)

    # -- for what was spawned

    def _start_helper(self) -> None:
        thread = threading.Thread(target=self._help, name="qcow2 helper", daemon=True)
        try:
            start_quiet(thread)
        except RuntimeError:  # a limit; the operation waits for one of the others
            return
        self._helpers.append(thread)

    def _help(self) -> None:
        while (work := self._work.get()) is not None:
            self._perform(*work)
            del work  # and with it what it refers to

    def close(self) -> None:
        """Wait until nothing is under way, and end the threads; nobody runs anything any more."""
        with self._lock:
            while self._under_way:
                self._idle.wait()
        for _ in self._helpers:
            self._work.put(None)
        for thread in self._helpers:
            thread.join()
        self._helpers.clear()


def _die(error: BaseException) -> None:
    """Others wait for what will never be: the process ends loudly, the image as after a crash."""
    try:
        traceback.print_exception(error)
        sys.stderr.flush()
    finally:  # whoever reads it or not
        os._exit(os.EX_SOFTWARE)
