"""Arithmetic between guest offsets, tables and clusters; nothing here knows what is allocated."""

from dataclasses import dataclass

from qcow2.format.layout import SECTOR_SIZE, SUBCLUSTERS, HeaderRecord

SLICE_BYTES = 4096  # the unit in which L2 tables are read and cached, unless a cluster is smaller


def whole_sectors(path: str, nbytes: int) -> int:
    """The size that a disk of *nbytes* has: rounded up to a sector. Raises: ValueError for a negative one."""
    if nbytes < 0:
        raise ValueError(f"{path}: size {nbytes} is negative")
    return nbytes + -nbytes % SECTOR_SIZE


def require_inside(size: int, guest_offset: int, nbytes: int) -> None:
    """Raises: ValueError if the range is not inside a disk of *size* bytes."""
    if guest_offset < 0 or nbytes < 0 or guest_offset + nbytes > size:
        raise ValueError(f"{nbytes} bytes at {guest_offset} are not inside the disk of {size} bytes")


@dataclass(slots=True)
class Geometry:
    """The sizes that follow from a header. Only `size` ever changes, and only the growing of the disk changes it."""

    version: int
    cluster_bits: int
    cluster_size: int
    has_subclusters: bool
    has_data_file: bool  # data is in a file of its own, each cluster where it would be in a raw disk
    subcluster_size: int  # the cluster's where it has none
    entry_size: int  # of an L2 table, bytes
    size: int  # guest bytes, a multiple of 512
    table_bits: int  # log2 of the guest bytes that one L2 table maps
    slice_bytes: int
    slice_bits: int  # log2 of the guest bytes that one slice maps
    refcount_order: int
    block_bits: int  # log2 of the host clusters that one refcount block counts

    @classmethod
    def of(cls, record: HeaderRecord) -> "Geometry":
        """The geometry of a validated header."""
        bits = record.cluster_bits
        slice_bytes = min(1 << bits, SLICE_BYTES)
        entry_size = record.entry_size
        return cls(
            version=record.version,
            cluster_bits=bits,
            cluster_size=1 << bits,
            has_subclusters=record.has_subclusters,
            has_data_file=record.has_data_file,
            subcluster_size=(1 << bits) // (SUBCLUSTERS if record.has_subclusters else 1),
            entry_size=entry_size,
            size=record.size // SECTOR_SIZE * SECTOR_SIZE,  # as QEMU rounds
            table_bits=bits + ((1 << bits) // entry_size).bit_length() - 1,
            slice_bytes=slice_bytes,
            slice_bits=bits + (slice_bytes // entry_size).bit_length() - 1,
            refcount_order=record.refcount_order,
            block_bits=bits + 3 - record.refcount_order,
        )

    @property
    def can_have_bitmaps(self) -> bool:
        """Whether there is a place for dirty bitmaps: version 2 has none."""
        return self.version >= 3

    def cluster_of(self, offset: int) -> int:
        """Number of the cluster that holds the byte at *offset*."""
        return offset >> self.cluster_bits

    def clusters(self, nbytes: int) -> int:
        """How many clusters hold *nbytes*."""
        return -(-nbytes >> self.cluster_bits)

    def round_up(self, nbytes: int) -> int:
        """*nbytes* up to a whole cluster."""
        return self.clusters(nbytes) << self.cluster_bits

    def round_down(self, offset: int) -> int:
        """Start of the cluster that holds *offset*."""
        return offset >> self.cluster_bits << self.cluster_bits

    def l1_index(self, guest_offset: int) -> int:
        """Which L1 entry leads to *guest_offset*."""
        return guest_offset >> self.table_bits

    def entry_offset(self, guest_offset: int) -> int:
        """Where in its L2 table the entry of *guest_offset* lies, in bytes."""
        return (guest_offset >> self.cluster_bits) * self.entry_size % self.cluster_size

    def slice_of(self, guest_offset: int) -> int:
        """Number of the slice, counted over the whole disk, that maps *guest_offset*."""
        return guest_offset >> self.slice_bits

    def slice_end(self, guest_offset: int) -> int:
        """Where the slice that maps *guest_offset* ends, in guest bytes."""
        return (guest_offset >> self.slice_bits) + 1 << self.slice_bits
