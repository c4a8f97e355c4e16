"""A load on a device: what to ask for, and what came of it."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import TYPE_CHECKING, Any

from bench.latency import Histogram, merge
from bench.native import ffi, lib
from ring import native as ring_native
from ring.native import Pointer, check

if TYPE_CHECKING:
    from bench.frontend import FrontEnd

SLICE = 200_000_000  # nanoseconds in C before Python looks at its signals
MEMORY_ALIGNMENT = 4096


class Kind(Enum):
    """What is asked for, beside reads."""

    WRITE = lib.LOAD_WRITE
    DISCARD = lib.LOAD_DISCARD
    WRITE_ZEROES = lib.LOAD_WRITE_ZEROES


class Order(Enum):
    """Where requests go."""

    RANDOM = lib.PATTERN_RANDOM
    SEQUENTIAL = lib.PATTERN_SEQUENTIAL
    ONCE = lib.PATTERN_ONCE  # one block of every stride, scattered; the load ends when all were visited


class LoadFailure(Exception):
    """The server answered wrongly or not at all."""


@dataclass(frozen=True, slots=True)
class Job:
    """What the generator does; see `load.h`."""

    nbytes: int  # of the disk, from its start
    kind: Kind = Kind.WRITE
    read_percent: int = 0
    block_size: int = 4096
    depth: int = 1  # a queue
    queues: int = 1
    order: Order = Order.RANDOM
    stride: int = 65536
    flush_every: int = 0
    verify: bool = False
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the generator counted between two moments; flushes count beside the requests, not among them."""

    seconds: float
    requests: int
    writes: int
    flushes: int
    latencies: Histogram  # nanoseconds
    flush_latencies: Histogram
    kicks: int
    sleeps: int

    @property
    def iops(self) -> float:
        return self.requests / self.seconds if self.seconds else 0.0


class Load(AbstractContextManager["Load"]):
    """The generator at work on a connected front-end."""

    def __init__(self, job: Job, front_end: "FrontEnd") -> None:
        if job.verify and job.nbytes // job.block_size < 4 * job.depth * job.queues:
            raise ValueError(f"{job.nbytes} bytes are too few to verify {job.depth * job.queues} requests in flight")
        self._job: Pointer = ffi.new("struct load_job *", _native_job(job, front_end))
        nbytes = lib.load_memory_nbytes(self._job)
        address = front_end.memory.allocate(nbytes, align=MEMORY_ALIGNMENT)
        host = ring_native.ffi.cast("uintptr_t", front_end.memory.host(address, nbytes))
        rings = [(ffi.cast("struct driver_ring *", queue.native_address), queue.kick_fd) for queue in front_end.queues]
        queues = ffi.new("struct load_queue[]", rings)
        self._native = lib.load_create(self._job, queues, ffi.cast("uint8_t *", int(host)), address)
        if self._native == ffi.NULL:
            raise MemoryError("no memory for the load generator")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        lib.load_destroy(self._native)

    def run(self, seconds: float) -> bool:
        """Drive the load for *seconds* -> whether there is anything left to do. Raises: OSError."""
        left = round(seconds * 1e9)
        while left > 0:
            if check(lib.load_run(self._native, min(left, SLICE)), "server"):
                return False
            left -= SLICE
        return True

    def reset(self) -> None:
        """Count from now on only."""
        lib.load_reset(self._native)

    def drain(self) -> None:
        """Wait for what is in flight. Raises: OSError."""
        check(lib.load_drain(self._native), "server")

    def outcome(self) -> Outcome:
        """What happened since the last reset. Raises: LoadFailure if any of it was wrong."""
        counts = lib.load_counts(self._native)
        if counts.failed or counts.corrupt:
            raise LoadFailure(f"{counts.failed} requests failed, {counts.corrupt} reads returned wrong data")
        completed = list(counts.completed)
        flushes = completed[lib.LOAD_FLUSH]
        reads = completed[lib.LOAD_READ]
        return Outcome(
            seconds=counts.nanoseconds / 1e9,
            requests=sum(completed) - flushes,
            writes=sum(completed) - flushes - reads,
            flushes=flushes,
            latencies=merge([_histogram(counts, kind) for kind in range(len(completed)) if kind != lib.LOAD_FLUSH]),
            flush_latencies=_histogram(counts, lib.LOAD_FLUSH),
            kicks=counts.kicks,
            sleeps=counts.sleeps,
        )


def memory_nbytes(job: Job) -> int:
    """Bytes of guest memory the generator needs for *job*, wherever they start."""
    sizes = {"queue_count": job.queues, "depth": job.depth, "block_size": job.block_size}
    return MEMORY_ALIGNMENT + lib.load_memory_nbytes(ffi.new("struct load_job *", sizes))


def _histogram(counts: Any, kind: int) -> Histogram:
    return Histogram(lib.HISTOGRAM_STEPS, list(counts.latencies[kind].counts))


def _native_job(job: Job, front_end: "FrontEnd") -> dict[str, int]:
    return {
        "kind": job.kind.value,
        "read_percent": job.read_percent,
        "block_size": job.block_size,
        "depth": job.depth,
        "queue_count": job.queues,
        "order": job.order.value,
        "stride": job.stride,
        "flush_every": job.flush_every,
        "start": 0,
        "nbytes": job.nbytes,
        "seed": job.seed,
        "verify": job.verify,
        "indirect": front_end.indirect,
        "call_fd": front_end.queues[0].call_fd,
        "hangup_fd": front_end.fileno(),
    }
