"""A batch of links that wait: what one commit brings into the file."""

from collections.abc import Sequence
from dataclasses import dataclass

from qcow2.driver.operation import Signal


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
