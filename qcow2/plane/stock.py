"""What the allocator has reserved and not yet handed out: in C, where the extent map takes from it as well."""

from collections import deque
from collections.abc import Iterable
from typing import Any

from qcow2.native import ffi, lib


class Stock:
    """Owner of a `struct stock`, whose runs are the front of what there is."""

    def __init__(self) -> None:
        self.native: Any = ffi.new("struct stock *")
        self._first: Any = ffi.new("uint64_t *")
        self._more: deque[range] = deque()  # what has no room in C yet
        self._nmore = 0

    def __len__(self) -> int:
        return int(self.native.left) + self._nmore

    def open(self) -> None:
        """From now on clusters may be linked."""
        self.native.is_open = True

    def keep(self, low: int) -> None:
        """With *low* clusters left the extent map leaves a write to Python, which then can reserve more in time."""
        self.native.low = max(0, low - self._nmore)

    def add(self, areas: Iterable[range]) -> None:
        """These clusters are ready, too."""
        for area in areas:
            self._more.append(area)
            self._nmore += len(area)
        self._shift()

    def take(self, nclusters: int) -> range:
        """At most *nclusters* consecutive ones; at least one, if there are any."""
        self._shift()  # the extent map may have taken all that was in C
        count = lib.stock_take(self.native, nclusters, self._first)
        first = self._first[0]
        self._shift()
        return range(first, first + count)

    def _shift(self) -> None:
        while self._more and lib.stock_add(self.native, self._more[0].start, self._more[0].stop) == 0:
            self._nmore -= len(self._more.popleft())

    def take_all(self) -> list[range]:
        """Everything there is."""
        areas = []
        while self:
            areas.append(self.take(len(self)))
        return areas

    def take_spoiled(self) -> list[int]:
        """Clusters that the extent map took in vain and may have written to."""
        count, self.native.nspoiled = int(self.native.nspoiled), 0
        return [self.native.spoiled[index] for index in range(count)]

    def take_linked(self) -> int:
        """How many clusters the extent map has linked since it was asked last."""
        count, self.native.linked = int(self.native.linked), 0
        return count
