"""The internal snapshots of a disk, as Python has them."""

from qcow2.format.snapshot import Snapshot


class SnapshotList(tuple[Snapshot, ...]):
    """Snapshots; to be called, too, for who knows them as what a method returns."""

    __slots__ = ()

    def __call__(self) -> "SnapshotList":
        """These."""
        return self
