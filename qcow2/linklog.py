"""The link log: L2 entries that wait for their data to be stable, in memory that outlives the process.

A ring of records. Each carries a sequence number and a checksum, so that a record torn by a death is none, and the
first sequence number that was still live, so that the newest record tells where the log begins. To forget the front
of the log is therefore to append a record, too: one that links nothing.
"""

import struct
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from qcow2.native import ffi, lib
from qcow2.operation import Memory, Store

MAGIC = b"qcow2LNK"
VERSION = 1
IDENTITY_BYTES = 32
HEADER = struct.Struct(f"<8sIII{IDENTITY_BYTES}s")  # magic, version, tag, capacity, identity; then the checksum
CHECKSUM = struct.Struct("<I")
RECORD = struct.Struct("<QQQQQ")  # guest cluster, old entry, new entry, sequence number, first live one; checksum
RECORDS_OFFSET = 64
RECORD_BYTES = lib.LINK_RECORD_NBYTES
WAITING = struct.Struct("=QQ")  # a struct waiting_link
CAPACITY = 65536  # records
MIN_CAPACITY = 4
LOG_BYTES = RECORDS_OFFSET + CAPACITY * RECORD_BYTES
NOTHING = (1 << 64) - 1  # in place of a guest cluster: a record that links nothing


class Link(NamedTuple):
    """One guest cluster's L2 entry, as it was and as it shall be."""

    cluster: int
    old_entry: int
    new_entry: int


class LinkLog:
    """Writes one log, from the first record on, to *memory*, which is empty.

    *identity* says whose it is; *tag*, not 0, is also in the image's header as long as the log counts.
    """

    def __init__(self, memory: Memory, identity: bytes, tag: int, capacity: int = CAPACITY) -> None:
        self.tag = tag
        self.capacity = capacity
        self.native: Any = ffi.new("struct link_log *", {"capacity": capacity, "first": 1, "next": 1})
        self._memory = memory
        self._identity = identity

    @property
    def next(self) -> int:
        """The sequence number of the next record."""
        return int(self.native.next)

    @property
    def room(self) -> int:
        """How many links it takes now; one record is kept for forgetting."""
        return self.capacity - 1 - int(self.native.next - self.native.first)

    def open(self) -> None:
        """From now on the extent map may append links, too, if it can reach the memory."""
        self.native.memory = ffi.cast("uint8_t *", self._memory.address)

    def close(self) -> None:
        """The extent map appends no more."""
        self.native.memory = ffi.NULL

    def take_waiting(self) -> list[tuple[int, int]]:
        """What the extent map has appended since it was asked last: guest clusters and their new entries."""
        count, self.native.nlinks = int(self.native.nlinks), 0
        return list(WAITING.iter_unpack(bytes(ffi.buffer(self.native.links, count * WAITING.size)))) if count else []

    async def begin(self) -> None:
        """Make the memory a log, before the first link. Raises: OSError if there is none to be had."""
        header = HEADER.pack(MAGIC, VERSION, self.tag, self.capacity, self._identity)
        whole = header + CHECKSUM.pack(zlib.crc32(header))
        await Store(self._memory, (0, whole.ljust(RECORDS_OFFSET, b"\0")))

    def append(self, links: Iterable[Link]) -> Store:
        """Remember *links*, for which there is room, as soon as what is returned is awaited."""
        parts = []
        for cluster, old_entry, new_entry in links:
            parts.append(self._record(cluster, old_entry, new_entry))
        return Store(self._memory, *parts)

    def forget(self, before: int) -> Store:
        """Let the log begin with sequence number *before*, once awaited: the links in front are in the file."""
        self.native.first = before
        return Store(self._memory, self._record(NOTHING, 0, 0))

    def _record(self, cluster: int, old_entry: int, new_entry: int) -> tuple[int, bytes]:
        """The next record, and where it goes."""
        record = ffi.new("uint8_t[]", RECORD_BYTES)
        offset = lib.link_log_record(self.native, cluster, old_entry, new_entry, record)
        self.native.next += 1
        return offset, bytes(ffi.buffer(record))


class FoundLog(NamedTuple):
    """What an earlier process left."""

    tag: int
    links: list[Link]


def read_log(content: bytes, identity: bytes) -> FoundLog | None:
    """The live links in *content*, oldest first; None if it is no log of *identity*, or contradicts itself."""
    if not RECORDS_OFFSET <= len(content) <= LOG_BYTES:
        return None
    magic, version, tag, capacity, owner = HEADER.unpack_from(content)
    (checksum,) = CHECKSUM.unpack_from(content, HEADER.size)
    if (magic, version, owner) != (MAGIC, VERSION, identity) or checksum != zlib.crc32(content[: HEADER.size]):
        return None
    if not MIN_CAPACITY <= capacity <= CAPACITY:
        return None
    records = _valid_records(content, capacity)
    if not records:
        return FoundLog(tag, [])
    last = max(records)
    first = records[last][4]
    if not 1 <= first <= last or last - first >= capacity:
        return None
    live = (records[sequence] for sequence in range(first, last + 1) if sequence in records)  # one may have failed
    return FoundLog(tag, [Link(*record[:3]) for record in live if record[0] != NOTHING])


def _valid_records(content: bytes, capacity: int) -> dict[int, tuple[int, ...]]:
    """By sequence number, those that are whole and where they belong."""
    records = {}
    for slot in range(min(capacity, (len(content) - RECORDS_OFFSET) // RECORD_BYTES)):
        start = RECORDS_OFFSET + slot * RECORD_BYTES
        record = content[start : start + RECORD.size]
        (checksum,) = CHECKSUM.unpack_from(content, start + RECORD.size)
        if checksum == zlib.crc32(record):
            fields = RECORD.unpack(record)
            if fields[3] % capacity == slot:
                records[fields[3]] = fields
    return records
