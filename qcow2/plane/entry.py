"""The face of `entry.h`, the one decoder of what L1 and L2 tables hold: nobody else knows a bit of an entry.

An entry of an L2 table is an int to everybody: its word and, above that, the bitmap of its subclusters if it has them.
"""

import errno
from array import array
from collections.abc import Iterable, Iterator, Sequence
from sys import byteorder
from typing import Any

from qcow2.format.geometry import Geometry
from qcow2.format.layout import SECTOR_SIZE
from qcow2.native import ffi, lib

WORD_BITS = 64
WORD = (1 << WORD_BITS) - 1
L1_ENTRY_SIZE = 8
OFFSET: int = lib.ENTRY_OFFSET
COPIED: int = lib.ENTRY_COPIED
COMPRESSED: int = lib.ENTRY_COMPRESSED
ZERO: int = lib.ENTRY_ZERO
SUBCLUSTERS: int = lib.ENTRY_SUBCLUSTERS
L1_RESERVED: int = lib.L1_ENTRY_RESERVED
OFFSET_LIMIT = (1 << 56) - 1  # of a compressed cluster


def words_of(table: bytes) -> "array[int]":
    """The 64-bit words of a table as it is in the file."""
    words = array("Q", table)
    if byteorder == "little":
        words.byteswap()
    return words


def bytes_of(words: Iterable[int]) -> bytes:
    """A table of 64-bit words as it is in the file."""
    swapped = array("Q", words)
    if byteorder == "little":
        swapped.byteswap()
    return swapped.tobytes()


def native_entry(entry: int) -> Any:
    """*entry* as C takes it, a struct entry."""
    return ffi.new("struct entry *", (entry & WORD, entry >> WORD_BITS))[0]


class Entries:
    """The entries of L2 tables of images with one geometry."""

    def __init__(
        self, cluster_bits: int, version: int, *, has_subclusters: bool = False, is_identity: bool = False
    ) -> None:
        """*is_identity*: data is in a file of its own, each cluster where it would be in a raw disk."""
        subcluster_bits = cluster_bits - (lib.ENTRY_SUBCLUSTER_BITS if has_subclusters else 0)
        self.native: Any = ffi.new(
            "struct entry_format *",
            (cluster_bits, version, subcluster_bits, 1 if has_subclusters else 0, is_identity),
        )
        self.has_subclusters = has_subclusters
        self.is_identity = is_identity
        self.nbytes = 16 if has_subclusters else 8  # of one
        self.zeros = self._int(lib.entry_zeros(self.native))  # without a host cluster; 0 in version 2
        self._cluster_bits = cluster_bits
        self._full = self._int(lib.entry_data(self.native, 0))

    @classmethod
    def of(cls, geometry: Geometry) -> "Entries":
        """Those of an image with *geometry*."""
        return cls(
            geometry.cluster_bits,
            geometry.version,
            has_subclusters=geometry.has_subclusters,
            is_identity=geometry.has_data_file,
        )

    @staticmethod
    def _int(entry: Any) -> int:
        number: int = entry.word | entry.bitmap << WORD_BITS
        return number

    def text(self, entry: int) -> str:
        """*entry* for a message: its words."""
        words = f"{entry & WORD:#018x}"
        return f"{words} {entry >> WORD_BITS:#018x}" if self.has_subclusters else words

    def unpack(self, table: bytes) -> Sequence[int]:
        """The entries of a table, or of a piece of one, as it is in the file."""
        words = words_of(table)
        if not self.has_subclusters:
            return words
        return [word | bitmap << WORD_BITS for word, bitmap in zip(words[::2], words[1::2], strict=True)]

    def pack(self, entries: Iterable[int]) -> bytes:
        """*entries* as they are in the file."""
        return bytes_of(self.words(entries))

    def words(self, entries: Iterable[int]) -> Iterable[int]:
        """*entries* as C takes them."""
        if not self.has_subclusters:
            return entries
        return [word for entry in entries for word in (entry & WORD, entry >> WORD_BITS)]

    def at(self, table: bytes | bytearray, index: int) -> int:
        """Entry number *index* of a table as it is in the file."""
        return self.unpack(bytes(table[index * self.nbytes : (index + 1) * self.nbytes]))[0]

    def data(self, host_offset: int, nclusters: int = 1) -> list[int]:
        """*nclusters* guest clusters whose data is theirs alone, one after the other from *host_offset* on."""
        first = self._full | host_offset
        return [first + (ahead << self._cluster_bits) for ahead in range(nclusters)]

    def moved(self, entry: int, nclusters: int) -> list[int]:
        """*entry* and those of the clusters that follow its own in the file."""
        step = 1 << self._cluster_bits if self.has_cluster(entry) else 0
        return [entry + ahead * step for ahead in range(nclusters)]

    def zeroed(self, entry: int, first: int, last: int) -> int:
        """The same host cluster, if there is one, and zeros in the subclusters from *first* to *last*."""
        return self._int(lib.entry_zeroed(self.native, native_entry(entry), first, last))

    def unwritten(self, entry: int) -> int:
        """The same host cluster, with nothing said of any subcluster."""
        assert self.has_subclusters
        return entry & WORD

    def written(self, entry: int, host_offset: int, first: int, last: int) -> int:
        """The host cluster at *host_offset* with data in the subclusters *first* to *last*, else what *entry* says."""
        return self._int(lib.entry_written(self.native, native_entry(entry), host_offset, first, last))

    def host_offset(self, entry: int) -> int:
        """Of the host cluster that *entry*, which is not compressed, names; 0: none."""
        return 0 if entry & COMPRESSED else entry & OFFSET

    def has_cluster(self, entry: int) -> bool:
        """Whether *entry* names a whole host cluster; in a file of its own the first one is at 0."""
        return not entry & COMPRESSED and bool(lib.entry_has_cluster(self.native, native_entry(entry)))

    def is_own(self, entry: int, own: int) -> bool:
        """Whether *entry* names the cluster that *own* does, as nobody else's, or none."""
        return entry & WORD & ~ZERO in (0, own & WORD)

    def is_copied(self, entry: int) -> bool:
        """Whether *entry* says that its host cluster has no other reference."""
        return bool(entry & COPIED)

    def has_zero_flag(self, entry: int) -> bool:
        """Whether *entry* says zeros as version 2 cannot."""
        return bool(entry & ZERO) and not entry & COMPRESSED and not self.has_subclusters

    def is_compressed(self, entry: int) -> bool:
        """Whether *entry* names a stream."""
        return bool(entry & COMPRESSED)

    def is_data(self, entry: int) -> bool:
        """Whether *entry* says nothing but that data of its own is at a host cluster, or in parts of it."""
        if not entry & COPIED or entry & COMPRESSED or not entry & OFFSET:
            return False
        native = native_entry(entry)
        is_sound = not lib.entry_is_bad(self.native, native) and not lib.entry_is_askew(self.native, native)
        return is_sound and (self.has_subclusters or entry == self._full | (entry & OFFSET))

    def blank(self, entry: int) -> int:
        """The host cluster of *entry*, which reads as zeros."""
        return self.zeroed(entry, 0, SUBCLUSTERS - 1)

    def is_alike(self, one: int, other: int) -> bool:
        """Whether they say the same, but perhaps for who else refers to it."""
        return (one ^ other) & ~COPIED == 0

    def flipped(self, entry: int) -> int:
        """*entry* with the other COPIED flag."""
        return entry ^ COPIED

    def flip(self, table: bytearray, indexes: Iterable[int]) -> None:
        """Give these entries of a table, as it is in the file, the other COPIED flag: the first bit of each."""
        for index in indexes:
            table[index * self.nbytes] ^= COPIED >> WORD_BITS - 8

    def shared(self, table: bytes) -> bytes:
        """A table as it is in the file, its clusters referred to by others, too."""
        return self.pack(entry & ~COPIED for entry in self.unpack(table))

    def clusters(self, table: bytes) -> list[int]:
        """The host clusters that the standard entries of a table name."""
        return [
            self.host_offset(entry) >> self._cluster_bits for entry in self.unpack(table) if self.host_offset(entry)
        ]

    def flagged(self, table: bytes, alone: "set[int]") -> bytes:
        """A table whose standard entries say of the host clusters *alone*, and of no others, that they are theirs."""
        entries = self.unpack(table)
        return self.pack(
            entry
            if entry & COMPRESSED
            else entry & ~COPIED | (COPIED if (entry & OFFSET) >> self._cluster_bits in alone else 0)
            for entry in entries
        )

    def has_data(self, entry: int) -> bool:
        """Whether a subcluster of *entry* is data."""
        return bool(lib.entry_data_bits(native_entry(entry)))

    def without_cluster(self, entry: int) -> int:
        """*entry*, which has no data, without its host cluster: what it says of zeros stays."""
        return self._int(lib.entry_without_cluster(native_entry(entry)))

    def shows_no_data(self, entry: int) -> bool:
        """Whether *entry*, which is not compressed, shows the same without its host cluster."""
        return not self.has_data(entry) if self.has_subclusters else self.native.version >= 3 and bool(entry & ZERO)

    def payload(self, entry: int) -> tuple[int, int]:
        """Host offset and greatest length of the stream that a compressed *entry* names."""
        payload = lib.entry_payload(self.native, native_entry(entry))
        return payload.host_offset, payload.nbytes

    def descriptor(self, host_offset: int, nbytes: int) -> int:
        """The entry of a stream.

        Raises: OSError(EFBIG) if it lies where no entry can point.
        """
        offset_bits = 62 - (self._cluster_bits - 8)
        if host_offset + nbytes > min((1 << offset_bits) - 1, OFFSET_LIMIT):
            raise OSError(errno.EFBIG, f"a compressed cluster cannot be at {host_offset:#x}")
        sectors = (host_offset + nbytes - 1) // SECTOR_SIZE - host_offset // SECTOR_SIZE
        return COMPRESSED | sectors << offset_bits | host_offset

    def contradictions(self, entry: int) -> Iterator[str]:
        """What is wrong with *entry* wherever the file ends."""
        if entry & COMPRESSED:
            if entry & COPIED:
                yield f"compressed cluster at {self.payload(entry)[0]:#x} has the copied flag set"
            if entry >> WORD_BITS:
                yield f"compressed cluster has subclusters {entry >> WORD_BITS:#018x}"
            return
        data, zero = entry >> WORD_BITS & 0xFFFFFFFF, entry >> WORD_BITS + 32
        if entry & lib.ENTRY_RESERVED:
            yield f"has reserved bits set: {entry & WORD:#018x}"
        if data & zero:
            yield f"has subclusters that are data and zeros at once: {entry >> WORD_BITS:#018x}"
        elif data and not self.has_cluster(entry):
            yield f"has subclusters of data but no cluster: {entry >> WORD_BITS:#018x}"
        if self.native.version < 3 and entry & ZERO:
            yield "has the zero flag set, which version 2 does not have"


def l1_entry(host_offset: int) -> int:
    """The entry of a private table, or a free place without one at 0."""
    return host_offset | COPIED if host_offset else 0


def l1_table(entry: int) -> int:
    """Host offset of the table that an L1 *entry* leads to; 0: none."""
    return entry & OFFSET


def l1_is_private(entry: int) -> bool:
    """Whether an L1 *entry* leads to a table that nobody shares."""
    return bool(entry & COPIED and entry & OFFSET)


def l1_is_sound(entry: int, cluster_size: int) -> bool:
    """Whether a table can be where *entry* says."""
    return not entry & L1_RESERVED and (entry & OFFSET) % cluster_size == 0


def l1_has_reserved_bits(entry: int) -> bool:
    """Whether *entry* has bits without a meaning."""
    return bool(entry & L1_RESERVED)


def l1_shared(entries: Iterable[int]) -> "array[int]":
    """The entries, their tables referred to by others, too."""
    return array("Q", (entry & ~COPIED for entry in entries))


def l1_flagged(entries: Iterable[int], alone: "set[int]", cluster_bits: int) -> "array[int]":
    """The entries, which say of the tables in the host clusters *alone*, and of no others, that they are theirs."""
    return array(
        "Q", (entry & ~COPIED | (COPIED if (entry & OFFSET) >> cluster_bits in alone else 0) for entry in entries)
    )
