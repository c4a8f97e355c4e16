"""The records of the qcow2 specification as bytes: constants, header fields, extensions, refcounts, compression."""

import struct
import zlib
from collections.abc import Iterable, Sequence

MAGIC = 0x514649FB
COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00

DIRTY = 1 << 0  # incompatible
CORRUPT = 1 << 1
EXTERNAL_DATA = 1 << 2
COMPRESSION_TYPE = 1 << 3
EXTENDED_L2 = 1 << 4
LAZY_REFCOUNTS = 1 << 0  # compatible
BITMAPS = 1 << 0  # autoclear

END, BACKING_FORMAT, FEATURE_NAMES, BITMAPS_EXTENSION = 0, 0xE2792ACA, 0x6803F857, 0x23852875

HEADER_FIELDS = {  # name: (offset, struct code)
    "magic": (0, "I"),
    "version": (4, "I"),
    "backing_file_offset": (8, "Q"),
    "backing_file_size": (16, "I"),
    "cluster_bits": (20, "I"),
    "size": (24, "Q"),
    "crypt_method": (32, "I"),
    "l1_size": (36, "I"),
    "l1_table_offset": (40, "Q"),
    "refcount_table_offset": (48, "Q"),
    "refcount_table_clusters": (56, "I"),
    "nb_snapshots": (60, "I"),
    "snapshots_offset": (64, "Q"),
    "incompatible_features": (72, "Q"),
    "compatible_features": (80, "Q"),
    "autoclear_features": (88, "Q"),
    "refcount_order": (96, "I"),
    "header_length": (100, "I"),
    "compression_type": (104, "B"),
}
V2_FIELDS = tuple(HEADER_FIELDS)[:13]


def padded(data: bytes, unit: int) -> bytes:
    """Append zeros up to a multiple of *unit*."""
    return data + bytes(-len(data) % unit)


def extension(kind: int, data: bytes) -> bytes:
    """One header extension: type, length, data padded to 8 bytes."""
    return struct.pack(">II", kind, len(data)) + padded(data, 8)


def feature_name_table(names: Iterable[tuple[int, int, str]]) -> bytes:
    """The data of the feature name table for (type, bit, name): type 0 incompatible, 1 compatible, 2 autoclear."""
    return b"".join(struct.pack(">BB46s", kind, bit, name.encode()) for kind, bit, name in names)


def deflate(data: bytes) -> bytes:
    """A raw deflate stream with qcow2's 4 KiB window."""
    stream = zlib.compressobj(9, zlib.DEFLATED, -12, 9)
    return stream.compress(data) + stream.flush()


def pack_refcounts(counts: Sequence[int], order: int) -> bytes:
    """A refcount block; entries narrower than a byte fill it from the least significant bit."""
    if order >= 3:
        return struct.pack(f">{len(counts)}{'BHIQ'[order - 3]}", *counts)
    width = 1 << order
    packed = bytearray(len(counts) * width // 8)
    for index, count in enumerate(counts):
        if count >> width:
            raise ValueError(f"refcount {count} does not fit in {width} bits")
        packed[index * width // 8] |= count << (index * width % 8)
    return bytes(packed)
