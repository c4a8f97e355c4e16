"""How far a file may grow before anybody needs it to: to the length that it has once all of its disk is data.

So no file is longer than was measured for its disk, only because it is open.
"""

from qcow2.engine.refcount import Refcounts
from qcow2.format.clusters import CountingClusters, counting_clusters, full_clusters
from qcow2.format.geometry import Geometry


class Foresight:
    """Of one image, whose geometry and refcounts it looks at."""

    def __init__(self, geometry: Geometry, refcounts: Refcounts, nluks: int) -> None:
        """*nluks* clusters hold its LUKS header."""
        self._geometry = geometry
        self._refcounts = refcounts
        self._nluks = nluks

    def room(self, file_size: int) -> int:
        """By how many clusters a file of *file_size* bytes may grow ahead; below 0: it is longer than a full disk's."""
        end, counted = self._geometry.clusters(file_size), len(self._refcounts.table) * self._refcounts.per_block
        needed, counting = self._full()
        if counted >= needed:
            return needed - end
        if end < counted:
            return counted - end
        moved = counting.table + 2  # the table, there twice for a while, and blocks that count the new one
        return max(1, needed - moved - end)

    @property
    def blocks(self) -> int:
        """How many refcount blocks a full disk needs."""
        return self._full()[1].blocks

    def _full(self) -> tuple[int, CountingClusters]:
        """How many clusters a full disk needs, and which of them count."""
        geometry = self._geometry
        others = full_clusters(geometry.size, geometry.cluster_size, geometry.entry_size, self._nluks)
        counting = counting_clusters(others, geometry.cluster_size, geometry.refcount_order)
        return others + sum(counting), counting
