"""The engine's coroutines on a ring worker: each operation they await becomes one of the worker's."""

import errno
import os
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

from qcow2.driver import operation as op
from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.far import FarFile
from qcow2.driver.file import perform, store
from qcow2.driver.task import Scheduler, Task
from qcow2.error import NotTried, no_memory
from qcow2.plane.space import lacks_space
from ring.operations import Piece
from ring.request import GuestSlice
from ring.thread import new_future
from ring.trace import Trace
from ring.worker import Worker


class RingDriver:
    """Runs coroutines of the engine on a worker: each operation they await becomes one of the worker's."""

    def __init__(self, worker: Worker, slots: dict[op.File, int], trace: Trace | None) -> None:
        self._worker = worker
        self._slots = slots
        self._trace = trace
        self._scheduler = Scheduler(self._start)

    def run(self, coroutine: Coroutine[Any, Any, Any], on_end: Callable[[Task], None]) -> None:
        """Begin *coroutine*; *on_end(task)* is called on the worker thread, perhaps before this returns."""
        self._scheduler.spawn(coroutine, on_end)
        self._scheduler.run()

    def go_on(self) -> None:
        """Let run what waited for a signal that was set."""
        self._scheduler.run()

    def _start(self, task: Task, operation: op.Operation) -> None:
        try:
            self._begin(task, operation)
        except OSError as error:
            self._scheduler.fail(task, error)
        except MemoryError:
            self._scheduler.fail(task, no_memory())

    def _begin(self, task: Task, operation: op.Operation) -> None:
        if isinstance(far := getattr(operation, "file", None), FarFile):
            self._begin_far(task, far, operation)
            return
        worker = self._worker
        match operation:
            case op.Read(file=file, host_offset=host_offset, nbytes=nbytes):
                target = bytearray(nbytes)
                worker.read(self._slots[file], host_offset, [target], self._end(task, file, lambda: bytes(target)))
            case op.ReadInto(file=file, host_offset=host_offset, target=buffer, data=data):
                worker.read(self._slots[file], host_offset, [_piece(buffer)], self._end(task, file), data=data)
            case op.WriteDespite(file=file, host_offset=host_offset, pieces=[piece]):
                worker.write_despite(self._slots[file], host_offset, _piece(piece), self._end(task, file))
            case op.Write(file=file, host_offset=host_offset, pieces=pieces, data=data):
                self._write(task, file, host_offset, [*map(_piece, pieces)], data=data)
            case op.WriteSome(file=file, parts=parts):
                count, number = worker.write_some(self._slots[file], parts)
                if number and not lacks_space(error := OSError(number, os.strerror(number), file.path)):
                    raise error
                self._scheduler.resume(task, count)
            case op.Zero(file=file, host_offset=host_offset, nbytes=nbytes):
                worker.zero(self._slots[file], host_offset, nbytes, self._end(task, file))
            case op.Sync(file=file):
                worker.sync(self._slots[file], self._end(task, file))
            case op.Grace():
                worker.grace(self._end(task, None))
            case op.Compute(function=function):
                worker.compute(function, self._compute_end(task))
            case op.Size(file=file) | op.Resize(file=file) if self._may_hang(file):
                worker.call_host(lambda: perform(operation), self._compute_end(task))
            case op.Size():  # of an inode that the host has in memory: not worth a thread
                self._scheduler.resume(task, self._size(operation))
            case op.Occupied(nbytes=nbytes):  # who serves does not ask what is sparse
                self._scheduler.resume(task, (True, nbytes))
            case op.Allocated(file=file):  # nor this
                self._begin(task, op.Size(file))
            case op.Store():
                self._store(operation)
                self._scheduler.resume(task)
            case op.Resize():  # the same
                self._resize(operation)
                self._scheduler.resume(task)
            case _:
                raise TypeError(f"not an operation of the disk: {operation!r}")

    def _begin_far(self, task: Task, file: FarFile, operation: op.Operation) -> None:
        outcome: Future[Any] = new_future()

        def end(result: Any, error: BaseException | None) -> None:
            if error is None:
                outcome.set_result(result)
            else:
                outcome.set_exception(error)

        file.begin(operation, end)
        self._worker.await_future(outcome, self._compute_end(task))

    def _size(self, operation: op.Size) -> int:
        return int(perform(operation))

    def _store(self, operation: op.Store) -> None:
        store(operation, self._write_mark, self._trace.store if self._trace is not None else lambda offset, data: None)

    def _write_mark(self, mark: op.Mark) -> None:
        self._worker.write_now(self._slots[mark.file], mark.host_offset, mark.data)

    def _may_hang(self, file: op.File) -> bool:
        return self._trace is None and not self._worker.is_near(self._slots[file])

    def _resize(self, operation: op.Resize) -> None:
        self._worker.cut_file(self._slots[operation.file], operation.nbytes)
        if self._trace is None:
            perform(operation)
            return
        traced = self._trace.resize(self._slots[operation.file], operation.nbytes)
        try:
            perform(operation)
        except OSError as error:
            self._trace.done(traced, -(error.errno or errno.EIO))
            raise
        self._trace.done(traced, 0)

    def _write(self, task: Task, file: op.File, host_offset: int, pieces: list[Piece], *, data: bool) -> None:
        """At once if that does not hold up other requests: most writes cost less than coming back for their end."""
        slot = self._slots[file]
        try:
            is_written = self._worker.write_at_once(slot, host_offset, pieces, data=data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, file.path) from None
        if is_written:
            self._scheduler.resume(task)
        else:
            self._worker.write(slot, host_offset, pieces, self._end(task, file), data=data)

    def _end(
        self, task: Task, file: op.File | None, result_of: Callable[[], bytes | None] = lambda: None
    ) -> Callable[[int], None]:
        """What the worker calls when an operation on *file* is done: the task goes on with *result_of()*."""

        def end(result: int) -> None:
            if result < 0:
                # Cancelled: the kernel could make no thread for it, so nothing was tried.
                kind = NotTried if result == -errno.ECANCELED else OSError
                self._scheduler.fail(task, kind(-result, os.strerror(-result), file and file.path))
            else:
                try:
                    self._scheduler.resume(task, result_of())
                except MemoryError:  # for a copy of what was read
                    self._scheduler.fail(task, no_memory())
            self._scheduler.run()

        return end

    def _compute_end(self, task: Task) -> Callable[[Any, BaseException | None], None]:
        def end(result: Any, error: BaseException | None) -> None:
            if error is not None:
                self._scheduler.fail(task, no_memory() if isinstance(error, MemoryError) else error)
            else:
                self._scheduler.resume(task, result)
            self._scheduler.run()

        return end


def _piece(buffer: bytes | bytearray | memoryview | op.Buffer) -> Piece:
    if isinstance(buffer, MemoryBuffer):
        return buffer.view
    if isinstance(buffer, GuestSlice | bytes | bytearray | memoryview):
        return buffer
    raise TypeError(f"not a buffer of this driver: {buffer!r}")
