"""What the data plane counted."""

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Counters:
    """A snapshot of C's `struct worker_counters`, field for field; every count starts at zero with the worker."""

    requests: int  # chains popped
    reads: int
    writes: int
    flushes: int
    discards: int
    write_zeroes: int
    other_requests: int  # GET_ID, unknown and malformed
    read_bytes: int
    written_bytes: int
    failed_requests: int  # answered with another status than OK, or without one
    python_requests: int  # requests that entered Python
    python_events: int  # all events handed to Python
    crossings: int  # times worker_run returned to Python
    kicks: int  # kick notifications seen
    calls: int  # call notifications sent
    syncs: int  # fdatasyncs started
    sync_waiters: int  # requests and operations they served
    batches: int  # publications of the used ring
    immediate: int  # transfers done on the worker's own thread, without io_uring
    stalls: int  # of them, those that made it wait too long
    immediate_syncs: int  # of the fdatasyncs, those on the worker's own thread
    polls: int  # rounds that looked for work instead of sleeping


FIELDS = tuple(field.name for field in fields(Counters))


def snapshot(native: Any) -> Counters:
    """Copy `struct worker_counters`; good from any thread, each count by itself is exact."""
    return Counters(*(getattr(native, name) for name in FIELDS))
