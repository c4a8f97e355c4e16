"""Tasks: the engine's coroutines, stepped by whoever finishes their operations; shared by every driver."""

from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from qcow2.driver.operation import Compute, Operation, Spawn, Together, Wait


class Task:
    """One coroutine under way; `done` tells when `result` or `error` holds its outcome."""

    __slots__ = ("coroutine", "done", "error", "on_done", "result")

    def __init__(self, coroutine: Coroutine[Any, Any, Any], on_done: Callable[["Task"], None] | None) -> None:
        self.coroutine = coroutine
        self.on_done = on_done
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None

    def take_error(self) -> BaseException | None:
        """The error, forgotten here. Its traceback leads to frames that know the task: together they would be a cycle,
        which keeps the data of a failed request until the garbage collector comes.
        """
        error, self.error = self.error, None
        return error


class Scheduler:
    """Steps tasks that are ready and hands each operation they await to *start*.

    *start(task, operation)* begins the operation and returns; whoever completes it calls `resume` or `fail` once,
    then `run`. It may do so from within *start*.
    """

    def __init__(self, start: Callable[[Task, Operation], None], *, joins: bool = False) -> None:
        """*joins*: *start* takes what is to be done `Together` as one; else it gets one after the other."""
        self._start = start
        self._joins = joins
        self._ready: deque[tuple[Task, Any, BaseException | None]] = deque()

    def spawn(self, coroutine: Coroutine[Any, Any, Any], on_done: Callable[[Task], None] | None = None) -> Task:
        """Make *coroutine* a task, stepped first at the next `run`; *on_done(task)* is called when it ends."""
        task = Task(coroutine, on_done)
        self._ready.append((task, None, None))
        return task

    def resume(self, task: Task, value: Any = None) -> None:
        """Queue *task* to go on with *value* as the result of what it awaits."""
        self._ready.append((task, value, None))

    def fail(self, task: Task, error: BaseException) -> None:
        """Queue *task* to go on with *error* raised at its await."""
        self._ready.append((task, None, error))

    def run(self) -> None:
        """Step until no task is ready."""
        ready = self._ready
        while ready:
            self._step(*ready.popleft())  # in no variable of this frame: a traceback would keep it

    def _step(self, task: Task, value: Any, error: BaseException | None) -> None:
        try:
            operation = task.coroutine.send(value) if error is None else task.coroutine.throw(error)
        except StopIteration as stop:
            self._end(task, stop.value, None)
        except BaseException as failure:  # the outcome of the task, delivered to its owner by _end
            error = None  # may be this failure, whose traceback has this frame
            self._end(task, None, failure)
        else:
            self._begin(task, operation)

    def _begin(self, task: Task, operation: Operation) -> None:
        if isinstance(operation, Wait):
            operation.signal.waiters.append(lambda: self.resume(task))
        elif isinstance(operation, Spawn):
            self.spawn(operation.coroutine)
            self.resume(task)
        elif isinstance(operation, Together) and not self._joins:
            self.spawn(_apart(operation), lambda ended: self._go_on(task, ended))
        else:
            self._start(task, operation)

    def _go_on(self, task: Task, ended: Task) -> None:
        """With what became of a part of it."""
        error = ended.take_error()
        if error is None:
            self.resume(task, ended.result)
        else:
            self.fail(task, error)

    def _end(self, task: Task, result: Any, error: BaseException | None) -> None:
        task.done = True
        task.result = result
        task.error = error
        if task.on_done is not None:
            task.on_done(task)
        elif error is not None:
            raise error


async def _apart(operation: Together) -> Any:
    for each in operation.operations:
        await each
    return await Compute(operation.function)
