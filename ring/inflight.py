"""Memory in which requests in flight are noted, so that they outlive the process that serves them."""

from dataclasses import dataclass

from ring.memory import MemoryRegion
from ring.native import lib


@dataclass(frozen=True, slots=True)
class InflightRegion:
    """A region as a front-end keeps it; *fd* belongs to it until a worker maps it, as with `MemoryRegion`."""

    fd: int
    mmap_offset: int
    nbytes: int
    num_queues: int  # share it evenly; whether a part has room for its ring follows from its size alone

    def memory(self) -> MemoryRegion:
        return MemoryRegion(self.fd, 0, 0, self.nbytes, self.mmap_offset)


def inflight_nbytes(num_queues: int, queue_size: int, *, packed: bool) -> int:
    """How many bytes a region for *num_queues* rings of at most *queue_size* entries has."""
    return num_queues * lib.inflight_nbytes(queue_size, packed)
