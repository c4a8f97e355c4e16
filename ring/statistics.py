"""How long things took, as the data plane counted it: histograms in powers of two."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Histogram:
    """*buckets[i]* counts what took less than 2**i ns and not less than half of that; the last one is open."""

    buckets: tuple[int, ...]
    nanoseconds: int  # the sum

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(self.buckets)


@dataclass(frozen=True, slots=True)
class QueueStatistics:
    """One virtqueue."""

    requests: int  # that were answered
    wait: Histogram  # from a kick until the first chain behind it was taken
    service: Histogram  # from there until the answer


@dataclass(frozen=True, slots=True)
class Statistics:
    """A snapshot of C's `struct worker_statistics`."""

    data: Histogram  # transfers of guest data
    metadata: Histogram  # other transfers, and zeroing
    sync: Histogram  # from the wish for an fdatasync until it was served
    queues: dict[int, QueueStatistics]  # by index, those that answered something


def snapshot(native: Any) -> Statistics:
    """Copy `struct worker_statistics`; good from any thread, each count by itself is exact."""
    queues = {
        index: QueueStatistics(queue.requests, _histogram(queue.wait), _histogram(queue.service))
        for index, queue in enumerate(native.queues)
        if queue.requests
    }
    return Statistics(_histogram(native.data), _histogram(native.metadata), _histogram(native.sync), queues)


def _histogram(native: Any) -> Histogram:
    return Histogram(tuple(native.buckets), native.nanoseconds)
