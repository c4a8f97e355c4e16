"""What an image shall hold and where: the guest's view, snapshots, extensions, features, the order on the disk."""

from dataclasses import dataclass, field
from typing import Literal

import zstandard

from tests.builder.record import EXTENDED_L2, deflate, padded

Layout = Literal["packed", "reversed", "scattered"]


@dataclass(eq=False)
class Cluster:
    """What one L2 entry stands for; two views that hold the same object share its host cluster."""

    kind: Literal["data", "zero", "preallocated zero", "compressed"]
    content: bytes = b""  # as the guest sees it, zeros implied up to the cluster
    at: int | None = None  # host cluster asked for
    host_offset: int = 0  # where it came to lie; for compressed clusters any byte
    nbytes: int = 0  # compressed bytes on the disk
    data_bits: int = 0xFFFFFFFF  # of an extended entry: the subclusters that are data,
    zero_bits: int = 0  # and those that are zeros; the others show the backing file

    @property
    def is_allocated(self) -> bool:
        return self.kind != "zero"


View = dict[int, Cluster]


@dataclass
class Recipe:
    """An image to be built; the guest's view is filled through `data`, `zero` and the like; see `build`."""

    size: int
    version: int = 3
    cluster_bits: int = 16
    refcount_order: int = 4
    layout: Layout = "packed"
    seed: int = 0
    l1_size: int | None = None
    backing: str | None = None
    extensions: list[tuple[int, bytes]] = field(default_factory=list)  # in file order; the end marker is implied
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    header_length: int = 112  # of version 3; writers before compression types wrote 104
    header_tail: bytes = b""  # fields of a later specification, after those
    compression: Literal["deflate", "zstd"] = "deflate"
    view: View = field(default_factory=dict)
    snapshots: list[tuple[str, View]] = field(default_factory=list)
    bitmaps: list[tuple[str, int]] = field(default_factory=list)  # name, granularity bits
    are_bitmaps_clean: bool = False  # else all their bits are set
    stream: bytearray = field(default_factory=bytearray, init=False)  # every compressed cluster, byte after byte
    stream_members: list[tuple[Cluster, int]] = field(default_factory=list, init=False)  # and where it starts there

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def entries_per_table(self) -> int:
        return self.cluster_size // self.entry_size

    @property
    def has_subclusters(self) -> bool:
        return bool(self.incompatible & EXTENDED_L2)

    @property
    def entry_size(self) -> int:
        return 16 if self.has_subclusters else 8

    def data(self, guest_cluster: int, content: bytes, *, at: int | None = None) -> None:
        """Map a guest cluster to a host cluster that holds *content*, at host cluster *at* if given."""
        self.view[guest_cluster] = Cluster("data", content, at)

    def parts(self, guest_cluster: int, content: bytes, *, data: int, zero: int = 0) -> None:
        """Map to a host cluster that holds *content*, of which only the subclusters of the bits *data* are shown."""
        self.view[guest_cluster] = Cluster("data", content, data_bits=data, zero_bits=zero)

    def zero(self, guest_cluster: int) -> None:
        """Set the zero flag without an allocation."""
        self.view[guest_cluster] = Cluster("zero")

    def preallocated_zero(self, guest_cluster: int, hidden: bytes = b"", *, at: int | None = None) -> None:
        """Set the zero flag over a host cluster that holds *hidden* bytes, which the guest must never see."""
        self.view[guest_cluster] = Cluster("preallocated zero", hidden, at)

    def compressed(self, guest_cluster: int, content: bytes, *, skip: int = 0, own_cluster: bool = False) -> None:
        """Map to a compressed cluster, *skip* bytes after the previous one or at the start of a host cluster."""
        content = padded(content, self.cluster_size)
        packed = deflate(content) if self.compression == "deflate" else zstandard.compress(content, 3)
        if len(packed) >= self.cluster_size:
            raise ValueError(f"guest cluster {guest_cluster} does not compress: {len(packed)} bytes")
        self.stream += bytes(-len(self.stream) % self.cluster_size if own_cluster else skip)
        cluster = Cluster("compressed", content, nbytes=len(packed))
        self.stream_members.append((cluster, len(self.stream)))
        self.stream += packed
        self.view[guest_cluster] = cluster

    def snapshot(self, name: str) -> None:
        """Keep the view as it is now as an internal snapshot; clusters replaced later stay alive in it."""
        self.snapshots.append((name, dict(self.view)))

    def contents(self, backing: bytes = b"") -> bytes:
        """What the guest reads from the whole disk over *backing*; for disks that fit in memory."""
        seen = bytearray(backing[: self.size].ljust(self.size, b"\0"))
        for index, cluster in self.view.items():
            content = b"" if "zero" in cluster.kind else cluster.content
            start, unit = index << self.cluster_bits, self.cluster_size // 32
            if cluster.kind == "data" and self.has_subclusters:
                for part in range(32):
                    at = start + part * unit
                    if cluster.data_bits >> part & 1:
                        seen[at : at + unit] = content[part * unit : (part + 1) * unit].ljust(unit, b"\0")
                    elif cluster.zero_bits >> part & 1:
                        seen[at : at + unit] = bytes(unit)
                continue
            seen[start : start + self.cluster_size] = content.ljust(self.cluster_size, b"\0")
        return bytes(seen[: self.size])
