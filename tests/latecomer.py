"""A driver under the unchanged engine whose operations land late, and in any order: at the moment they complete.

Until then nothing of them shows, and one in five is very slow. That is how a punch or a write that was overtaken hits
who came after. It keeps what `qcow2.driver.operation` promises and nothing more; a seed replays the order.
"""

import random
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from qcow2.driver.operation import Compute, Grace, Operation, Read, ReadInto, Resize, Size, Sync, Write, WriteSome, Zero
from qcow2.driver.task import Scheduler, Task

TRANSFERS = (Read, ReadInto, Write, Zero)


class MemoryFile:
    """A host file in memory."""

    def __init__(self, content: bytes) -> None:
        self.path = "image"
        self.writable = True
        self.content = bytearray(content)

    def read(self, host_offset: int, nbytes: int) -> bytes:
        return bytes(self.content[host_offset : host_offset + nbytes]).ljust(nbytes, b"\0")

    def write(self, host_offset: int, data: bytes) -> None:
        self.resize(max(len(self.content), host_offset + len(data)))
        self.content[host_offset : host_offset + len(data)] = data

    def resize(self, nbytes: int) -> None:
        del self.content[nbytes:]
        self.content += bytes(nbytes - len(self.content))


@dataclass(frozen=True, eq=False)
class Late:
    """An operation under way: its number, when it lands, who waits for it."""

    number: int
    due: float
    task: Task
    operation: Operation


class Latecomer:
    """Runs tasks; `step` lets one of the operations under way land, `now` counts the steps."""

    def __init__(self, file: MemoryFile, seed: int) -> None:
        self.file = file
        self.now = 0
        self._rng = random.Random(seed)
        self._pending: list[Late] = []
        self._started = 0
        self._scheduler = Scheduler(self._start)

    def begin(self, coroutine: Coroutine[Any, Any, Any]) -> Task:
        task = self._scheduler.spawn(coroutine, lambda task: None)
        self._scheduler.run()
        return task

    def finish(self, task: Task) -> Any:
        """Step until *task* is done; its result, or its error raised."""
        while not task.done:
            self.step()
        if task.error is not None:
            raise task.error
        return task.result

    def step(self) -> None:
        """Complete the operation that is due; a `Grace` waits for the transfers that began before it."""
        self.now += 1
        late = min((late for late in self._pending if not self._must_wait(late)), key=lambda late: late.due)
        self._pending.remove(late)
        self._scheduler.resume(late.task, self._land(late.operation))
        self._scheduler.run()

    def _start(self, task: Task, operation: Operation) -> None:
        self._started += 1
        delay = self._rng.random() * (200 if self._rng.randrange(5) == 0 else 4)
        self._pending.append(Late(self._started, self.now + delay, task, operation))

    def _must_wait(self, late: Late) -> bool:
        return isinstance(late.operation, Grace) and any(
            other.number < late.number and isinstance(other.operation, TRANSFERS) for other in self._pending
        )

    def _land(self, operation: Operation) -> object:
        match operation:
            case Size():
                return len(self.file.content)
            case Read(host_offset=host_offset, nbytes=nbytes):
                return self.file.read(host_offset, nbytes)
            case ReadInto(host_offset=host_offset, target=target):
                target.store(self.file.read(host_offset, len(target)))
            case Write(host_offset=host_offset, pieces=pieces):
                data = [bytes(p) if isinstance(p, bytes | bytearray | memoryview) else p.load() for p in pieces]
                self.file.write(host_offset, b"".join(data))
            case Zero(host_offset=host_offset, nbytes=nbytes):
                inside = max(0, min(nbytes, len(self.file.content) - host_offset))
                self.file.write(host_offset, bytes(inside))
            case Resize(nbytes=nbytes):
                self.file.resize(nbytes)
            case Compute(function=function):
                return function()
            case WriteSome():
                return 0
            case Sync() | Grace():
                pass
            case _:
                raise TypeError(f"{operation!r} is no operation of a driver")
        return None
