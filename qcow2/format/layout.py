"""Every record, mask and limit of the file format, nothing else; all numbers on disk are big-endian."""

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any, ClassVar, Self

MAGIC = 0x514649FB  # "QFI\xfb"
SECTOR_SIZE = 512

# Limits QEMU enforces; an image beyond them is refused before anything is allocated for it.
MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
MIN_CLUSTER_SIZE, MAX_CLUSTER_SIZE = 1 << MIN_CLUSTER_BITS, 1 << MAX_CLUSTER_BITS
MAX_REFCOUNT_ORDER = 6
V2_REFCOUNT_ORDER = 4
MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE_BYTES = 8 << 20
MAX_SNAPSHOTS = 65536
MAX_SNAPSHOT_TABLE_BYTES = 64 << 20
MAX_SNAPSHOT_EXTRA_BYTES = 1024
MAX_BACKING_NAME_BYTES = 1023
MAX_LUKS_BYTES = 64 << 20
MAX_BITMAPS = 65535
MAX_BITMAP_DIRECTORY_BYTES = 64 << 20
MAX_BITMAP_TABLE_ENTRIES = 0x8000000
MAX_BITMAP_TABLE_BYTES = 16 << 20  # of all bitmaps: what 1 GiB of bits takes in clusters of 512 bytes
MAX_BITMAP_NAME_BYTES = 1023


class Incompatible(IntFlag):
    """Header bytes 72-79: who does not know a set bit must not open the image."""

    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    EXTERNAL_DATA = 1 << 2
    COMPRESSION_TYPE = 1 << 3
    EXTENDED_L2 = 1 << 4


class Compatible(IntFlag):
    """Header bytes 80-87: who does not know a set bit ignores and keeps it."""

    LAZY_REFCOUNTS = 1 << 0


class Autoclear(IntFlag):
    """Header bytes 88-95: who does not know a set bit clears it before the first write."""

    BITMAPS = 1 << 0
    RAW_EXTERNAL_DATA = 1 << 1


PROMISES = 0xFF  # the autoclear bits beside the mark: they hold until the first change

# Ours, in autoclear bits that have no meaning: the mark of the link log whose links wait, 0 if none does (`linklog`).
# Who writes to the image and does not know it must clear it, and so tells that the log is void.
LOG_MARK_SHIFT = 8

CRYPTO = struct.Struct(">QQ")  # header extension CRYPTO: where the LUKS header lies, and how long it is with its keys


class CryptMethod(IntEnum):
    """Header bytes 32-35."""

    NONE = 0
    AES = 1
    LUKS = 2


class CompressionType(IntEnum):
    """Header byte 104; 0 if the header ends before it."""

    ZLIB = 0
    ZSTD = 1


# As options name them.
COMPRESSIONS = {kind.name.lower(): kind for kind in CompressionType}
VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}


class ExtensionMagic(IntEnum):
    """The header extensions that have a published meaning."""

    END = 0
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    CRYPTO = 0x0537BE77
    DATA_FILE = 0x44415441


def values_of(record: Any) -> list[int]:
    """The fields of a record in their order; `dataclasses.astuple` copies each deeply, ten times as slow."""
    return [getattr(record, name) for name in record.__slots__]


@dataclass(frozen=True, slots=True)
class HeaderRecord:
    """The header's known fields, in their order on disk; those past byte 72 hold their defaults in version 2."""

    magic: int
    version: int
    backing_file_offset: int
    backing_file_size: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int
    snapshots_offset: int
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = V2_REFCOUNT_ORDER
    header_length: int = 72
    compression_type: int = 0

    @property
    def has_subclusters(self) -> bool:
        """Whether the entries of L2 tables are extended."""
        return bool(self.incompatible_features & Incompatible.EXTENDED_L2)

    @property
    def has_data_file(self) -> bool:
        """Whether the guest's data is in a file of its own."""
        return bool(self.incompatible_features & Incompatible.EXTERNAL_DATA)

    @property
    def has_raw_data(self) -> bool:
        """Whether that file, read as a raw image, is the same disk."""
        return self.has_data_file and bool(self.autoclear_features & Autoclear.RAW_EXTERNAL_DATA)

    @property
    def entry_size(self) -> int:
        """Bytes of an entry of an L2 table."""
        return EXTENDED_ENTRY_SIZE if self.has_subclusters else ENTRY_SIZE

    @property
    def l1_end(self) -> int:
        """Where the L1 table ends in the file; 0 if there is none."""
        return self.l1_table_offset + self.l1_size * ENTRY_SIZE if self.l1_size else 0

    @property
    def refcount_table_nbytes(self) -> int:
        """Length of the refcount table in the file, whole clusters."""
        return self.refcount_table_clusters << self.cluster_bits

    V2: ClassVar[struct.Struct] = struct.Struct(">IIQIIQIIQQIIQ")
    V3: ClassVar[struct.Struct] = struct.Struct(">IIQIIQIIQQIIQQQQII")
    V3_COMPRESSION: ClassVar[struct.Struct] = struct.Struct(">IIQIIQIIQQIIQQQQIIB")

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Split the first bytes of an image, at least 112 of them, padded with zeros if the file is shorter."""
        version = int.from_bytes(data[4:8], "big")
        if version < 3:
            return cls(*cls.V2.unpack_from(data))
        header_length = int.from_bytes(data[100:104], "big")
        return cls(*(cls.V3_COMPRESSION if header_length > cls.V3.size else cls.V3).unpack_from(data))

    def pack(self) -> bytes:
        """The known fields as they stand on disk, as far as version and header_length reach."""
        values = values_of(self)
        if self.version < 3:
            return self.V2.pack(*values[:13])
        if self.header_length > self.V3.size:
            return self.V3_COMPRESSION.pack(*values)
        return self.V3.pack(*values[:18])


# Header fields that change together, in one write: they share the first sector, so a power loss keeps or loses all.
HEADER_BACKING_OFFSET = 8
HEADER_BACKING = struct.Struct(">QI")  # backing_file_offset, backing_file_size
HEADER_VERSION_OFFSET = 4
HEADER_VERSION = struct.Struct(">I")
HEADER_SIZE_OFFSET = 24
HEADER_SIZE = struct.Struct(">Q")
HEADER_L1_OFFSET = 36
HEADER_L1 = struct.Struct(">IQ")  # l1_size, l1_table_offset
HEADER_REFCOUNT_TABLE_OFFSET = 48
HEADER_REFCOUNT_TABLE = struct.Struct(">QI")  # refcount_table_offset, refcount_table_clusters
HEADER_DISK_OFFSET = 24
HEADER_DISK = struct.Struct(">QIIQ")  # size, crypt_method, l1_size, l1_table_offset
HEADER_SNAPSHOTS_OFFSET = 60
HEADER_SNAPSHOTS = struct.Struct(">IQ")  # nb_snapshots, snapshots_offset
HEADER_INCOMPATIBLE_OFFSET = 72
HEADER_COMPATIBLE_OFFSET = 80
HEADER_AUTOCLEAR_OFFSET = 88
HEADER_REFCOUNT_ORDER_OFFSET, HEADER_REFCOUNT_ORDER = 96, struct.Struct(">I")
FEATURE_WORD = struct.Struct(">Q")
V2_HEADER_LENGTH = 72
V3_HEADER_LENGTH = 104
V3_HEADER_LENGTH_WITH_COMPRESSION = 112  # compression_type and seven bytes of padding

EXTENSION = struct.Struct(">II")  # magic, length of the data that follows, itself padded to a multiple of 8
FEATURE_NAME = struct.Struct(">BB46s")  # FeatureNameType, bit number, name padded with zeros


class FeatureNameType(IntEnum):
    """Which feature word an entry of the feature name table names."""

    INCOMPATIBLE = 0
    COMPATIBLE = 1
    AUTOCLEAR = 2


# Table entries; what is in those of L1 and L2 tables only `qcow2.plane.entry` knows.
ENTRY_SIZE = 8
EXTENDED_ENTRY_SIZE = 16  # of L2 tables with subclusters
SUBCLUSTERS = 32  # of a cluster that has any
MIN_CLUSTER_BITS_OF_SUBCLUSTERS = 14
REFCOUNT_TABLE_OFFSET_MASK = 0xFFFF_FFFF_FFFF_FE00
REFCOUNT_TABLE_RESERVED = 0x1FF
BITMAP_ENTRY_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
BITMAP_ENTRY_ALL_ONES = 1 << 0  # only where the offset is 0
BITMAP_ENTRY_RESERVED = 0xFF00_0000_0000_01FE


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """One entry of the snapshot table; extra data, id and name follow it, then padding to a multiple of 8."""

    l1_table_offset: int
    l1_size: int
    id_size: int
    name_size: int
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size: int
    extra_data_size: int

    FORMAT: ClassVar[struct.Struct] = struct.Struct(">QIHHIIQII")

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Split the first 40 bytes of *data*."""
        return cls(*cls.FORMAT.unpack_from(data))

    def pack(self) -> bytes:
        """The record as it stands on disk."""
        return self.FORMAT.pack(*values_of(self))


SNAPSHOT_EXTRA = struct.Struct(
    ">QQQ"
)  # 64-bit vm_state_size, disk size, icount; each present as far as extra_data_size reaches


@dataclass(frozen=True, slots=True)
class BitmapsRecord:
    """The bitmaps header extension."""

    nb_bitmaps: int
    reserved: int
    directory_size: int
    directory_offset: int

    FORMAT: ClassVar[struct.Struct] = struct.Struct(">IIQQ")

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Split the 24 bytes of the extension."""
        return cls(*cls.FORMAT.unpack_from(data))

    def pack(self) -> bytes:
        """The extension as it stands on disk."""
        return self.FORMAT.pack(*values_of(self))


class BitmapFlags(IntFlag):
    """Flags of a bitmap directory entry."""

    IN_USE = 1 << 0
    AUTO = 1 << 1
    EXTRA_DATA_COMPATIBLE = 1 << 2


@dataclass(frozen=True, slots=True)
class BitmapRecord:
    """One entry of the bitmap directory; extra data and name follow it, then padding to a multiple of 8."""

    table_offset: int
    table_size: int  # entries
    flags: int
    type: int
    granularity_bits: int
    name_size: int
    extra_data_size: int

    FORMAT: ClassVar[struct.Struct] = struct.Struct(">QIIBBHI")

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Split the first 24 bytes of *data*."""
        return cls(*cls.FORMAT.unpack_from(data))

    def pack(self) -> bytes:
        """The record as it stands on disk."""
        return self.FORMAT.pack(*values_of(self))


# Fields of a directory entry that change in place; entries begin at multiples of 8, so neither leaves its sector.
BITMAP_TABLE_OFFSET = 0
BITMAP_FLAGS_OFFSET, BITMAP_FLAGS = 12, struct.Struct(">I")
BITMAP_TYPE_DIRTY = 1
MAX_BITMAP_BYTES = 512 << 20  # of one bitmap's bits
MIN_BITMAP_GRANULARITY_BITS, MAX_BITMAP_GRANULARITY_BITS = 9, 31
