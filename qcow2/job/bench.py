"""Requests of one size over a disk, so many at a time: how long they take."""

import errno
import os
from dataclasses import dataclass

from qcow2.driver.buffer import MemoryBuffer
from qcow2.job.crew import Crew
from qcow2.job.pace import Pace
from qcow2.node.node import Node


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked for."""

    count: int = 75_000
    depth: int = 64  # requests at a time
    nbytes: int = 4096  # of each
    step: int = 4096  # from one to the next
    offset: int = 0
    writes: bool = False
    pattern: int = 0  # the byte that is written
    flush_interval: int = 0  # a flush after so many writes; 0: none
    drains: bool = True  # before a flush


async def bench(image: Node, load: Load, pace: Pace) -> None:
    """Do as *load* says, at the end of the disk from its start again.

    Raises: OSError, EIO before anything is changed if the first request is not inside; ImageError, Cancelled.
    """
    if load.offset + load.nbytes > image.size:  # of each later one `_next` sees to it
        raise OSError(errno.EIO, os.strerror(errno.EIO), image.file.path)
    pace.begin(load.count)
    requests = _Requests(image, load, pace)
    step = load.flush_interval if load.flush_interval and load.drains else load.count
    for first in range(0, load.count, step or 1):
        await requests.run(min(load.count - first, step))
        if load.flush_interval and load.drains and first + step <= load.count:
            await image.flush()


class _Requests:
    """As many at a time as the load is deep: each of so many loops makes one after the other."""

    def __init__(self, image: Node, load: Load, pace: Pace) -> None:
        self._image = image
        self._load = load
        self._pace = pace
        self._offset = load.offset
        self._begun = 0  # since the start
        self._last = 0

    async def run(self, count: int) -> None:
        """Make *count* more, and return when all have ended."""
        crew = Crew(self._load.depth)
        self._last = self._begun + count
        for _ in range(min(count, self._load.depth)):
            await crew.start(self._loop())
        await crew.join()

    async def _loop(self) -> None:
        load, image = self._load, self._image
        buffer = MemoryBuffer(memoryview(bytearray([load.pattern]) * load.nbytes))
        flushes = load.flush_interval if not load.drains else 0
        while self._begun < self._last:
            self._pace.require_going()
            self._begun += 1
            number, offset = self._begun, self._next()
            if load.writes:
                await image.write(offset, buffer)
            else:
                await image.read(offset, buffer)
            if flushes and number % flushes == 0:
                await image.flush()
            self._pace.advance(1)

    def _next(self) -> int:
        load, offset = self._load, self._offset
        self._offset += load.step
        if self._offset + load.nbytes > self._image.size:
            self._offset = load.offset
        return offset
