"""Files that no system call of ours reaches: what is asked of one is done elsewhere."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any
from weakref import WeakSet

from qcow2.driver.operation import Operation
from qcow2.driver.thread import take

End = Callable[[Any, BaseException | None], None]  # is told the result of an operation, or its error


class FarFile(ABC):
    """What such a file has besides what a `HostFile` has; its length is given, as a device's."""

    @abstractmethod
    def give_up(self) -> None:
        """Let whatever is under way fail, and all that comes; does not wait, also in the handler of a signal."""

    @abstractmethod
    def begin(self, operation: Operation, end: End) -> None:
        """Have *operation* done; *end(result, error)* is called once, on any thread, perhaps before this returns."""


in_use: WeakSet[FarFile] = WeakSet()  # which nobody has closed


def give_up_all() -> None:
    """Wait for none of them any more: the process is to end, and one may never answer."""
    for file in list(in_use):
        file.give_up()


def wait_for(file: FarFile, operation: Operation) -> Any:
    """The result of *operation* on *file*; raises what it raises."""
    outcomes: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
    file.begin(operation, lambda result, error: outcomes.put((result, error)))
    result, error = take(outcomes)
    if error is not None:
        try:
            raise error
        finally:
            del error  # whose traceback has this frame
    return result
