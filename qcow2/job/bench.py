"""Requests of one size over a disk, so many at a time: how long they take."""

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
    """Do as *load* says, at the end of the disk from its start again. Raises: OSError, ImageError, Cancelled."""
    crew = Crew(load.depth)
    buffers = [memoryview(bytearray([load.pattern]) * load.nbytes) for _ in range(load.depth)]
    pace.begin(load.count)
    offset = load.offset

    async def one(where: int) -> None:
        buffer = buffers.pop()
        if load.writes:
            await image.write(where, MemoryBuffer(buffer))
        else:
            await image.read(where, MemoryBuffer(buffer))
        buffers.append(buffer)
        pace.advance(1)

    for number in range(1, load.count + 1):
        pace.require_going()
        await crew.start(one(offset))
        offset += load.step
        if offset + load.nbytes > image.size:
            offset = load.offset if load.offset + load.nbytes <= image.size else 0
        if load.flush_interval and number % load.flush_interval == 0:
            if load.drains:
                await crew.join()
            await image.flush()
    await crew.join()
