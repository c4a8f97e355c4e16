"""A batch of links that wait: what one commit brings into the file."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qcow2.driver.operation import Signal
from qcow2.format.geometry import Geometry


@dataclass(slots=True)
class Unrecorded:
    """A link whose record does not count; until it is in the file nobody may see it."""

    guest_offset: int
    entries: Sequence[int]
    old_entries: Sequence[int]
    freed: Sequence[int]  # host clusters
    is_taken_back: bool = False


class Batch:
    """Links that are committed together, and those who wait for it."""

    __slots__ = (
        "error",
        "freed",
        "gathered",
        "is_flushed",
        "is_wanted",
        "linked",
        "links",
        "nclusters",
        "stable",
        "unrecorded",
    )

    def __init__(self) -> None:
        self.links: list[tuple[int, Sequence[int]]] = []  # guest offset, entries of one slice
        self.gathered: dict[int, int] = {}  # later ones, of the extent map: guest cluster, entry
        self.unrecorded: list[Unrecorded] = []  # of `links`
        self.nclusters = 0
        self.freed: list[int] = []  # host clusters that they leave
        self.is_wanted = False
        self.is_flushed = False  # somebody waits for `stable`
        self.linked = Signal()
        self.stable = Signal()
        self.error: OSError | None = None

    def end(self, error: OSError | None = None) -> None:
        """Let everybody go on, with *error* if it failed."""
        self.error = error
        self.linked.set()
        self.stable.set()

    def earlier(self, clusters: Iterable[int], cluster_bits: int) -> list[tuple[int, Sequence[int]]]:
        """The links of *clusters* that were gathered, no longer the latest."""
        gathered = self.gathered
        return [(cluster << cluster_bits, (gathered.pop(cluster),)) for cluster in clusters if cluster in gathered]

    def joined(self, geometry: Geometry) -> Iterable[tuple[int, list[int]]]:
        """The links in order, of each cluster the last one; those that meet within a slice as one."""
        bits = geometry.cluster_bits
        in_slice = 1 << geometry.slice_bits - bits
        newest = {
            cluster: entry
            for guest_offset, entries in self.links
            for cluster, entry in enumerate(entries, guest_offset >> bits)
        } | self.gathered
        start, joined = 0, list[int]()
        for cluster in sorted(newest):
            if cluster != start + len(joined) or not cluster % in_slice:
                if joined:
                    yield start << bits, joined
                start, joined = cluster, []
            joined.append(newest[cluster])
        if joined:
            yield start << bits, joined
