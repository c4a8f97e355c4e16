"""How often each host cluster is referenced, as counted by who checks an image; the counts live in C."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Any

from qcow2.format.layout import ENTRY_SIZE
from qcow2.native import Pointer, check, ffi, lib
from qcow2.plane.entry import Entries

MAX_CLUSTERS = (
    1 << 36
)  # bounds what a file that lies about its length costs: 128 MiB, and 20 KiB per 4096 clusters used


class Role(IntFlag):
    """What references a cluster; mirrors enum tally_role."""

    SINGLE = 1  # a structure that exactly one thing may reference
    L2 = 2
    DATA = 4
    ACTIVE = 8  # besides L2: a table of the active image, not only of snapshots


@dataclass(frozen=True, slots=True)
class TableCount:
    """What one L2 table holds, and the indexes of its entries that somebody has to look at."""

    allocated: int
    fragmented: int
    compressed: int
    suspects: Sequence[int]


@dataclass(frozen=True, slots=True)
class Differences:
    """How many clusters a refcount block counts too low and too high, and how many wrong at all."""

    too_low: int
    too_high: int
    differing: int


class Tally:
    """Counts for *nclusters* host clusters of an image with *entries*, in a file of *file_size* bytes."""

    def __init__(self, nclusters: int, entries: Entries, file_size: int) -> None:
        created = lib.tally_create(nclusters)
        if created == ffi.NULL:
            raise MemoryError(f"no memory to count the references to {nclusters} clusters")
        self.nclusters = nclusters
        self._tally: Pointer = ffi.gc(created, lib.tally_destroy)
        self.entries = entries
        self._format = ffi.new("struct tally_format *", (entries.native[0], file_size))
        self._indexes: Any = ffi.new("uint32_t[]", (1 << entries.native.cluster_bits) // ENTRY_SIZE)
        self._count = ffi.new("struct tally_l2 *")

    def add(self, first: int, nclusters: int, role: Role, weight: int = 1) -> None:
        """Count *weight* references to each of the clusters; a negative weight takes references back.

        Raises: OSError(ERANGE) if they are not below `nclusters`.
        """
        check(lib.tally_add(self._tally, first, nclusters, weight, role))

    def count(self, cluster: int) -> int:
        """How often *cluster* is referenced."""
        return lib.tally_count(self._tally, cluster)

    def has(self, cluster: int, role: Role) -> bool:
        """Whether *cluster* was counted in *role*."""
        return bool(lib.tally_roles(self._tally, cluster) & role)

    def clusters(self, roles: Role) -> Iterator[int]:
        """Every referenced cluster with one of *roles*, ascending."""
        cluster = lib.tally_next(self._tally, 0, roles)
        while cluster < self.nclusters:
            yield cluster
            cluster = lib.tally_next(self._tally, cluster + 1, roles)

    def next(self, cluster: int) -> int | None:
        """The first referenced cluster from *cluster* on."""
        found = lib.tally_next(self._tally, cluster, Role.SINGLE | Role.L2 | Role.DATA)
        return found if found < self.nclusters else None

    def has_any(self, first: int, nclusters: int) -> bool:
        """Whether one of the clusters is referenced."""
        found = self.next(first)
        return found is not None and found < first + nclusters

    def end(self, limit: int) -> int:
        """One past the last referenced cluster below *limit*."""
        return lib.tally_end(self._tally, limit)

    def misfit(self, block: Pointer, refcount_order: int, first: int, nentries: int) -> int | None:
        """The first cluster from *first* on, of those counted, whose refcount in *block* is zero or has no room."""
        index = lib.tally_fits(self._tally, block, refcount_order, first, nentries)
        return first + index if index < nentries else None

    def change_counts(self, block: Pointer, refcount_order: int, first: int, nentries: int, sign: int) -> None:
        """Add what we counted from cluster *first* on to the refcounts in *block*, which can hold it; or take it away.

        *sign*: 1 or -1.
        """
        lib.tally_change(self._tally, block, refcount_order, first, nentries, sign)

    def find_free(self, nclusters: int) -> int:
        """The first of the earliest *nclusters* consecutive clusters without a reference."""
        return lib.tally_find_free(self._tally, nclusters)

    def overlaps(self) -> Iterator[int]:
        """Clusters whose references contradict each other though the image counts them right."""
        cluster = lib.tally_overlap(self._tally, 0)
        while cluster < self.nclusters:
            yield cluster
            cluster = lib.tally_overlap(self._tally, cluster + 1)

    def add_l2(self, table: bytes, weight: int) -> TableCount:
        """Count what an L2 table references, each reference *weight* times."""
        found, nentries = self._count, len(table) // self.entries.nbytes
        view = ffi.from_buffer("uint8_t[]", table)
        check(lib.tally_l2(self._tally, self._format, view, nentries, weight, found, self._indexes))
        suspects = ffi.unpack(self._indexes, found.nbad)
        return TableCount(found.allocated, found.fragmented, found.compressed, suspects)

    def differing(self, block: bytes | None, refcount_order: int, first: int, nentries: int) -> Iterator[int]:
        """Clusters from *first* on whose stored refcount, in *block* or else zero, is not what we counted."""
        view = ffi.NULL if block is None else ffi.from_buffer("uint8_t[]", block)
        index = lib.tally_differ(self._tally, view, refcount_order, first, 0, nentries)
        while index < nentries:
            yield first + index
            index = lib.tally_differ(self._tally, view, refcount_order, first, index + 1, nentries)

    def sum_differences(self, block: bytes | None, refcount_order: int, first: int, n: int, end: int) -> Differences:
        """Count what `differing` would yield; those from cluster *end* on are neither too low nor too high."""
        view = ffi.NULL if block is None else ffi.from_buffer("uint8_t[]", block)
        found = ffi.new("struct tally_sums *")
        lib.tally_sum(self._tally, view, refcount_order, first, n, end, found)
        return Differences(found.too_low, found.too_high, found.differing)

    def pack(self, refcount_order: int, first: int, nbytes: int) -> bytearray:
        """A refcount block of *nbytes* with our counts from cluster *first* on."""
        block = bytearray(nbytes)
        view = ffi.from_buffer("uint8_t[]", block)
        lib.tally_pack(self._tally, view, refcount_order, first, nbytes * 8 >> refcount_order)
        return block

    def miscopied(self, table: bytes, *, is_l1: bool, counted: bool) -> list[int]:
        """Indexes of entries whose COPIED flag does not say if the refcount is one: the stored or, *counted*, ours.

        *table* is an L2 table or at most a cluster of an L1 table.
        """
        view = ffi.from_buffer("uint8_t[]", table)
        nentries = len(table) // (ENTRY_SIZE if is_l1 else self.entries.nbytes)
        n = lib.tally_copied(self._tally, self._format, view, nentries, is_l1, counted, self._indexes)
        found: list[int] = ffi.unpack(self._indexes, n)
        return found


def stored_refcount(block: bytes | None, refcount_order: int, index: int) -> int:
    """Entry *index* of a refcount block; zero where there is none."""
    return 0 if block is None else lib.refcount_get(ffi.from_buffer("uint8_t[]", block), refcount_order, index)


def used_entries(block: bytes, refcount_order: int, limit: int) -> int:
    """One past the last entry of a refcount block below *limit* that is not zero."""
    return lib.refcount_used(ffi.from_buffer("uint8_t[]", block), refcount_order, limit)


def set_refcount(block: bytearray, refcount_order: int, index: int, value: int) -> None:
    """Store *value*, which fits, as entry *index* of a refcount block."""
    lib.refcount_set(ffi.from_buffer("uint8_t[]", block), refcount_order, index, value)
