"""What it took to keep the server's promises: fdatasyncs and metadata writes."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from bench.server import Server

QEMU_AIO_WRITE, QEMU_AIO_FLUSH = 2, 8
TRACE = ("--trace", "luring_co_submit")  # with aio=io_uring, everything QEMU asks of the disk
SUBMISSION = re.compile(r"luring_co_submit .*? type (\d+)")


@dataclass(frozen=True, slots=True)
class Counted:
    """Totals of one run, from the start of the server to its end."""

    acknowledged: int  # writes, discards and write-zeroes
    syncs: int
    metadata_writes: int
    batch: float | None = None  # requests that reached Python for each time that anything did

    @property
    def syncs_per_1000(self) -> float | None:
        return self.syncs / self.acknowledged * 1e3 if self.acknowledged else None

    @property
    def metadata_per_1000(self) -> float | None:
        return self.metadata_writes / self.acknowledged * 1e3 if self.acknowledged else None


# Ends a server that acknowledged so many changes since its load began, of which so many were writes of data.
Ending = Callable[[Server, int, int], Counted | None]


def stop_ours(server: Server, acknowledged: int, written: int) -> Counted:
    """Our daemon prints its counters when it is told to end; they include the warm-up."""
    counters = server.stop()
    acknowledged = sum(counters[kind] for kind in ("writes", "discards", "write_zeroes"))
    batch = counters["python_requests"] / counters["crossings"] if counters["crossings"] else None
    return Counted(acknowledged, counters["syncs"], counters["metadata_writes"], batch)


def leave_qemu(server: Server, acknowledged: int, written: int) -> None:
    """Let it be killed: nothing is wanted of its image.

    On SIGTERM qemu-storage-daemon 7.2 now and then hangs once its client has gone (2 of about 40 runs).
    """


def read_trace(server: Server, acknowledged: int, written: int) -> Counted:
    """Count what a traced qemu-storage-daemon submitted for *acknowledged* changes, *written* of them data."""
    kinds = [int(kind) for kind in SUBMISSION.findall(server.complaints())]
    return Counted(acknowledged, kinds.count(QEMU_AIO_FLUSH), kinds.count(QEMU_AIO_WRITE) - written)
