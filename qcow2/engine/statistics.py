"""Counters of one image since it was opened."""

from dataclasses import dataclass


@dataclass(slots=True)
class Statistics:
    """Counted by the engine; what the data plane serves alone is counted there."""

    metadata_writes: int = 0  # writes of tables, refcounts and header fields
    syncs: int = 0  # syncs the engine asked for; some share one fdatasync
    clusters_allocated: int = 0  # for guest data
    clusters_freed: int = 0
    copies: int = 0  # copy-on-write of a cluster
    l2_loads: int = 0  # slices read into the cache
    l2_tables: int = 0  # tables created or copied
    reservations: int = 0
    decompressions: int = 0

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(*(getattr(self, name) + getattr(other, name) for name in Statistics.__slots__))
