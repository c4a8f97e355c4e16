"""Pool driver: what takes long runs on threads, side by side, everything else as in the blocking driver.

Used by jobs that move much data: while one piece waits for the disk, others are copied, compared, looked through.
The coroutines themselves run on the caller's thread only.
"""

import threading
from collections.abc import Coroutine
from queue import SimpleQueue
from types import TracebackType
from typing import Any, TypeVar

from qcow2.driver import operation as op
from qcow2.driver.far import FarFile
from qcow2.driver.file import HostFile, go_on, outcome, result_of
from qcow2.driver.task import Scheduler, Task
from qcow2.driver.thread import start_quiet, take
from qcow2.native import lib

T = TypeVar("T")

LONG_TRANSFER = 64 << 10  # bytes; less is done before a thread wakes up


class PoolDriver:
    """Runs coroutines of the engine to their end; a context manager that ends its threads."""

    def __init__(self, nthreads: int, *, syncs: bool = True) -> None:
        """Unless it *syncs* it leaves to the host when what was written is stable: a power loss may keep any of it."""
        self._nthreads = nthreads
        self._syncs = syncs
        self._threads: list[threading.Thread] = []
        self._work: SimpleQueue[tuple[Task, op.Operation] | None] = SimpleQueue()
        self._done: SimpleQueue[tuple[Task, Any, BaseException | None]] = SimpleQueue()
        self._under_way = 0
        self._graces: list[Task] = []
        self._scheduler = Scheduler(self._start, joins=True)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Return the result of *coroutine*; everything it spawned has ended too, or waits for another run.

        An exception that a signal handler raises is raised here, once the threads are idle.
        """
        ended: list[Task] = []
        self._scheduler.spawn(coroutine, ended.append)
        try:
            self._scheduler.run()
            while self._under_way:
                self._complete()
        except BaseException:  # perhaps just as a result was taken out: no count tells who still works
            self.close()
            self._under_way = 0
            raise
        return result_of(coroutine, ended)

    def _complete(self) -> None:
        """Let those go on whose operation is done."""
        while True:
            task, value, error = take(self._done)
            self._under_way -= 1
            go_on(self._scheduler, task, value, error)
            if self._done.empty():
                break
        if not self._under_way:
            graces, self._graces = self._graces, []
            for grace in graces:
                self._scheduler.resume(grace)
        self._scheduler.run()

    def _start(self, task: Task, operation: op.Operation) -> None:
        if isinstance(operation, op.Grace) and self._under_way:
            self._graces.append(task)
        elif isinstance(operation, op.Sync) and not self._syncs:
            self._scheduler.resume(task)
        elif _takes_long(operation) and self._has_threads():
            self._under_way += 1
            self._work.put((task, operation))
        else:
            go_on(self._scheduler, task, *outcome(operation))

    def _has_threads(self) -> bool:
        """Start them with the first one's work; they take no signals. Where there are none, we do it."""
        if len(self._threads) < self._nthreads:
            thread = threading.Thread(target=self._serve, args=(self._work,), name="qcow2 pool", daemon=True)
            self._threads.append(thread)  # a signal may come as soon as it has started
            try:
                start_quiet(thread)
            except RuntimeError:
                self._threads.pop()
                self._nthreads = len(self._threads)
        return bool(self._threads)

    def _serve(self, given: "SimpleQueue[tuple[Task, op.Operation] | None]") -> None:
        while (work := given.get()) is not None:
            task, operation = work
            value, error = outcome(operation)
            if self._syncs and error is None:
                _begin_writeback(operation)
            self._done.put((task, value, error))
            del work, task, operation, value, error  # and with them what they refer to
        given.put(None)  # for the next

    def close(self) -> None:
        """End the threads once they have done what they were given: buffers and files are theirs until then."""
        self._work.put(None)  # one for all
        for thread in self._threads:
            if thread.ident is not None:  # else a signal came before its start
                thread.join()
        self._threads.clear()
        self._work = SimpleQueue()

    def __enter__(self) -> "PoolDriver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _begin_writeback(operation: op.Operation) -> None:
    """Let the disk begin with what was written, so that the sync at the end finds less to do; no promise."""
    match operation:
        case op.Write(file=FarFile()):
            pass
        case op.Write(file=HostFile(fd=fd), host_offset=host_offset) if _nbytes(operation) >= LONG_TRANSFER:
            lib.begin_writeback(fd, host_offset, _nbytes(operation))
        case op.CopyData(target=HostFile(fd=fd), pairs=pairs):
            for _, target_offset, nbytes in pairs:
                lib.begin_writeback(fd, target_offset, nbytes)
        case op.Together(operations=operations):
            for each in operations:
                _begin_writeback(each)


def _takes_long(operation: op.Operation) -> bool:
    match operation:
        case op.ReadInto(target=target):
            return len(target) >= LONG_TRANSFER
        case op.Write(pieces=pieces):
            return sum(map(len, pieces)) >= LONG_TRANSFER
        case op.Read(nbytes=nbytes):
            return nbytes >= LONG_TRANSFER
        case op.Together(operations=operations):
            return sum(map(_nbytes, operations)) >= LONG_TRANSFER
        case op.Zero() | op.Sync() | op.Compute() | op.CopyRange() | op.CopyData() | op.Equal():
            return True
        case _:
            return False


def _nbytes(operation: op.ReadInto | op.Write) -> int:
    return len(operation.target) if isinstance(operation, op.ReadInto) else sum(map(len, operation.pieces))
