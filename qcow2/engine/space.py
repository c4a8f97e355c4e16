"""The host clusters of an image that may be written: counted, handed out, taken back."""

from qcow2.engine.allocation import Allocator
from qcow2.engine.metadata import table_limit
from qcow2.engine.opened import Found, Opened
from qcow2.engine.reaper import Reaper
from qcow2.engine.refcount import Refcounts
from qcow2.engine.reservation import Reservations
from qcow2.engine.root import Root
from qcow2.engine.uncounted import Uncounted


class Space:
    """Who counts the host clusters of one image, who hands them out, who takes them back, wired up."""

    def __init__(self, opened: Opened, root: Root, found: Found) -> None:
        mapping, geometry = opened.mapping, opened.geometry
        self.refcounts = Refcounts(
            opened.file,
            geometry,
            found.refcount_table,
            root.header.record.refcount_table_offset,
            opened.stability,
            is_lazy=root.is_lazy,
        )
        nclusters, ntables = geometry.clusters(found.file_size), table_limit(mapping.l1, found.snapshots)
        self.uncounted = Uncounted(opened, root, self.refcounts, nclusters, ntables)
        self.reaper = Reaper(opened, self.refcounts, self.uncounted)
        reservations = Reservations(opened, root, self.refcounts, self.uncounted, self.reaper, found.file_size)
        self.allocator = Allocator(opened, root, self.refcounts, self.reaper, reservations)
        self.reaper.on_free = reservations.reuse
        mapping.cache.set_freed(self.reaper.freed)
