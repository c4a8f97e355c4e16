"""The link log: L2 entries that wait for their data to be stable, in memory that outlives the process.

A ring of records. Each carries a sequence number and a checksum, so that a record torn by a death is none, and the
first sequence number that was still live, so that each record tells which links waited when it was the newest. To
forget the front of the log is therefore to append a record, too: one that links nothing.

The image says which record is the newest that counts: its *mark*, in the header, names the log by a random tag, and the
record by its number (the stamp). A record counts once the mark names it, and the mark is written after the record,
before anything else happens. So the mark of an image that is restored or copied back, from whatever moment, names the
links that waited at that moment, or a record that is gone: never a later one. No link waits: no mark. Before its
numbers run out of stamps a log ends, and another with a tag of its own begins.

An image that was put over another one (`ctl snapshot`) says in its own log whose links may still wait below it. That
counts as its log does: while its header has a mark. So whoever else has written to it since has ended that.
"""

import struct
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Self

from qcow2.driver.boot import UNITS, Boot
from qcow2.driver.operation import File, Memory, Store
from qcow2.driver.operation import Mark as HeaderMark
from qcow2.native import ffi, lib
from qcow2.plane.dirtybits import MAX_LIVE_BYTES, LiveBits, parse_live
from qcow2.plane.entry import WORD_BITS, native_entry

MAGIC = b"qcow2LNK"
VERSION = 3
HEADER = struct.Struct("<8sIIIIQ16sQQ")  # magic, version, tag, capacity, bytes of the path; boot; device, inode; path
CHECKSUM = struct.Struct("<I")  # of the header and the path, behind them
BELOW = struct.Struct("<II")  # the tag of the log of what is below, 0 if none of its links wait; checksum
RECORD = struct.Struct("<QQQQQQQ")  # guest cluster, old entry, new entry, sequence number, first live one; checksum
RECORDS_OFFSET: int = lib.LINK_RECORDS_OFFSET
RECORD_BYTES: int = lib.LINK_RECORD_NBYTES
BELOW_OFFSET = RECORDS_OFFSET - BELOW.size
MAX_PATH = BELOW_OFFSET - HEADER.size - CHECKSUM.size
WAITING = struct.Struct("=QQQ")  # a struct waiting_link
CAPACITY = 1 << 16  # records
SMALL_CAPACITY, MAX_CAPACITY = 4, 1 << 18
MAX_LOG_BYTES = RECORDS_OFFSET + MAX_CAPACITY * RECORD_BYTES + 2 * MAX_LIVE_BYTES
NOTHING = (1 << 64) - 1  # in place of a guest cluster: a record that links nothing
STAMP_BITS: int = lib.LINK_STAMP_BITS
LIMIT: int = lib.LINK_LIMIT  # no link has this number or a later one
BOOT_SHIFT, TAG_SHIFT, TAG_BITS = STAMP_BITS, STAMP_BITS + 12, 24
assert UNITS == 1 << 12
NO_MARK = bytes(lib.LINK_MARK_NBYTES)
MARK_OFFSET: int = lib.LINK_MARK_OFFSET  # in the image's header


class Link(NamedTuple):
    """One guest cluster's L2 entry, as it was and as it shall be."""

    cluster: int
    old_entry: int
    new_entry: int


class Mark(NamedTuple):
    """What an image says of its log."""

    tag: int
    boot_unit: int  # of the boot of the host in which the log was made
    stamp: int  # of the newest record that counts

    @classmethod
    def parse(cls, word: int) -> Self:
        """Take the 56 bits of a header apart."""
        return cls(word >> TAG_SHIFT, word >> BOOT_SHIFT & (UNITS - 1), word & ((1 << STAMP_BITS) - 1))


class Origin(NamedTuple):
    """Where a log comes from. It counts for whichever image has its mark; this is for who lists and removes logs."""

    boot: Boot
    device: int
    inode: int
    path: bytes  # of the image


class LinkLog:
    """Writes logs, from the first record on, to *memory*, which is empty, and their marks to the header of *file*.

    *renew* empties the memory again, under another name, and returns the tag that is in it; *tag* is of the first log.
    """

    def __init__(
        self,
        memory: Memory,
        file: File,
        origin: Origin,
        tag: int,
        capacity: int = CAPACITY,
        *,
        renew: Callable[[], int],
    ) -> None:
        self.capacity = capacity
        self.has_live = False  # live bits of bitmaps are behind the records: the mark stays while no link waits
        self.below = 0  # the tag of the log of what is below, where links wait as well: the same
        self.memory_bytes = 0
        self.native: Any = ffi.new("struct link_log *", {"capacity": capacity})
        self._renew = renew
        self._memory = memory
        self._file = file
        self._origin = origin
        self._number(tag)

    def _number(self, tag: int) -> None:
        """Begin with the first number of the log *tag*."""
        self.tag = tag
        self.native.first = self.native.next = 1
        self.native.mark = tag << TAG_SHIFT | self._origin.boot.unit << BOOT_SHIFT

    def renew(self) -> None:
        """Go on with another log, to be begun; no link waits."""
        self._number(self._renew())

    @property
    def memory(self) -> Memory:
        """Where it lies."""
        return self._memory

    @property
    def live_offset(self) -> int:
        """Where live bits are in the memory, behind the records."""
        return live_offset(self.capacity)

    @property
    def idle_mark(self) -> bytes:
        """What the header says while no link waits: stamp 0 if the log says anything else, else nothing at all."""
        return int(self.native.mark).to_bytes(len(NO_MARK), "big") if self.has_live or self.below else NO_MARK

    @property
    def path(self) -> str:
        """What it is called in messages."""
        return self._memory.path

    @property
    def next(self) -> int:
        """The sequence number of the next record."""
        return int(self.native.next)

    @property
    def room(self) -> int:
        """How many links it takes now; one record is kept for forgetting."""
        return min(self.capacity - 1 - int(self.native.next - self.native.first), LIMIT - self.next)

    def is_used_up(self, nlinks: int) -> bool:
        """Whether another log must begin before so many links are appended."""
        return self.next + nlinks > LIMIT

    @property
    def is_lost(self) -> bool:
        """Whether somebody has removed it, so that the next process would find nothing."""
        return self._memory.is_lost

    def open(self) -> None:
        """From now on the extent map may append links, too, if it can reach the memory."""
        self.native.memory = ffi.cast("uint8_t *", self._memory.address)

    def close(self) -> None:
        """The extent map appends no more."""
        self.native.memory = ffi.NULL

    def take_waiting(self) -> list[tuple[int, int]]:
        """What the extent map has appended since it was asked last: guest clusters and their new entries."""
        count = int(self.native.nlinks)
        records = WAITING.iter_unpack(bytes(ffi.buffer(self.native.links, count * WAITING.size))) if count else ()
        found = [(cluster, word | bitmap << WORD_BITS) for cluster, word, bitmap in records]
        self.native.nlinks = 0  # once there was memory for them
        return found

    async def begin(self, nbytes: int = 0) -> None:
        """Make the memory, of *nbytes* at least, a log, before the first link. Raises: OSError if none is to be had."""
        self.memory_bytes = max(nbytes, self.live_offset)
        self._memory.reserve(self.memory_bytes)
        boot, device, inode, path = self._origin
        path = path[:MAX_PATH]
        header = HEADER.pack(MAGIC, VERSION, self.tag, self.capacity, len(path), boot.began, boot.id, device, inode)
        whole = header + path
        whole += CHECKSUM.pack(zlib.crc32(whole))
        await Store(self._memory, (0, whole.ljust(RECORDS_OFFSET, b"\0")))

    def append(self, links: Iterable[Link], undo: Callable[[], None] = lambda: None) -> Store:
        """Remember *links*, for which there is room, as soon as what is returned is awaited; else *undo*."""
        before = self.native.next
        parts = [self._record(*link) for link in links]
        stored = self._store(parts, before, self._mark())

        def undo_all(forget: Callable[[], None] = stored.undo) -> None:
            forget()
            undo()

        stored.undo = undo_all
        return stored

    def forget(self, before: int) -> Store:
        """Let the log begin with sequence number *before*, once awaited: the links in front are in the file."""
        first, end = self.native.first, self.native.next
        self.native.first = before
        parts = [self._record(NOTHING, 0, 0)]
        stored = self._store(parts, end, self.idle_mark if before == end else self._mark())

        def undo() -> None:
            self.native.first, self.native.next = first, end

        stored.undo = undo
        return stored

    def name_below(self, tag: int, *, has_waiting: bool) -> Store:
        """Say, once awaited, that links of what is below wait in the log *tag*, 0: that none does any more.

        *has_waiting*: links wait here, so that the mark is of their record.
        """
        past, self.below = self.below, tag
        number = struct.pack("<I", tag)

        def undo() -> None:
            self.below = past

        mark = None if has_waiting else HeaderMark(self._file, MARK_OFFSET, self.idle_mark)
        return Store(self._memory, (BELOW_OFFSET, BELOW.pack(tag, zlib.crc32(number))), mark=mark, undo=undo)

    def _store(self, parts: list[tuple[int, bytes]], before: int, mark: bytes) -> Store:
        def undo() -> None:
            self.native.next = before

        return Store(self._memory, *parts, mark=HeaderMark(self._file, MARK_OFFSET, mark), undo=undo)

    def _record(self, cluster: int, old_entry: int, new_entry: int) -> tuple[int, bytes]:
        """The next record, and where it goes."""
        record = ffi.new("uint8_t[]", RECORD_BYTES)
        offset = lib.link_log_record(self.native, cluster, native_entry(old_entry), native_entry(new_entry), record)
        self.native.next += 1
        return offset, bytes(ffi.buffer(record))

    def _mark(self) -> bytes:
        """What the header says once all records so far count."""
        mark = ffi.new("uint8_t[]", lib.LINK_MARK_NBYTES)
        lib.link_log_mark(self.native, self.native.next - 1, mark)
        return bytes(ffi.buffer(mark))


class FoundLog(NamedTuple):
    """What a process left."""

    tag: int
    origin: Origin
    records: dict[int, tuple[int, ...]]  # by sequence number
    live: LiveBits | None = None
    below: int = 0  # the tag of the log of what is below, where links wait as well

    def newest(self) -> int:
        """The number of the newest record, whether it counts or not; 0 if there is none."""
        return max(self.records, default=0)

    def links_at(self, stamp: int) -> list[Link] | None:
        """The links that waited, oldest first, when the image had *stamp*; None if the log does not say so any more."""
        if not stamp:
            return []
        modulus = (1 << STAMP_BITS) - 1
        last = [number for number in self.records if number % modulus + 1 == stamp]
        if len(last) != 1:
            return None
        first = self.records[last[0]][4]
        if not 1 <= first <= last[0] or any(number not in self.records for number in range(first, last[0])):
            return None
        live = (self.records[number] for number in range(first, last[0] + 1))
        return [Link(*record[:3]) for record in live if record[0] != NOTHING]

    def waiting(self) -> int:
        """How many links waited at the newest record."""
        return len(self.newest_links())

    def newest_links(self) -> list[Link]:
        """The links that waited at the newest record, oldest first."""
        return (self.links_at(self.newest() % ((1 << STAMP_BITS) - 1) + 1) or []) if self.records else []


def live_offset(capacity: int) -> int:
    """Where live bits are behind so many records."""
    return RECORDS_OFFSET + capacity * RECORD_BYTES


def read_log(content: bytes) -> FoundLog | None:
    """The log in *content*; None if it is none, or contradicts itself."""
    if not RECORDS_OFFSET <= len(content) <= MAX_LOG_BYTES:
        return None
    magic, version, tag, capacity, nbytes, began, boot_id, device, inode = HEADER.unpack_from(content)
    if (magic, version) != (MAGIC, VERSION) or nbytes > MAX_PATH or not SMALL_CAPACITY <= capacity <= MAX_CAPACITY:
        return None
    end = HEADER.size + nbytes
    if CHECKSUM.unpack_from(content, end)[0] != zlib.crc32(content[:end]):
        return None
    origin = Origin(Boot(began, boot_id), device, inode, content[HEADER.size : end])
    live = parse_live(memoryview(content)[live_offset(capacity) :])
    return FoundLog(
        tag, origin, valid_records(memoryview(content)[RECORDS_OFFSET:], capacity), live, _tag_below(content)
    )


def _tag_below(content: bytes) -> int:
    tag, checksum = BELOW.unpack_from(content, BELOW_OFFSET)
    return int(tag) if checksum == zlib.crc32(content[BELOW_OFFSET : BELOW_OFFSET + 4]) else 0


def capacity_of(head: bytes) -> int:
    """How many records a log has room for, by its header."""
    return int(HEADER.unpack_from(head)[3])


def number_of(record: bytes) -> int:
    """What number a record claims, 0 if it is not whole."""
    return int(RECORD.unpack_from(record)[5]) if len(record) >= RECORD.size else 0


def valid_records(slots: bytes | memoryview, capacity: int, first_slot: int = 0) -> dict[int, tuple[int, ...]]:
    """By sequence number, those that are whole and where they belong; *slots* are those from *first_slot* on."""
    records = {}
    for slot in range(first_slot, min(capacity, first_slot + len(slots) // RECORD_BYTES)):
        start = (slot - first_slot) * RECORD_BYTES
        record = slots[start : start + RECORD.size]
        (checksum,) = CHECKSUM.unpack_from(slots, start + RECORD.size)
        if checksum == zlib.crc32(record):
            cluster, old, old_bitmap, new, new_bitmap, *rest = RECORD.unpack(record)
            fields = (cluster, old | old_bitmap << WORD_BITS, new | new_bitmap << WORD_BITS, *rest)
            if fields[3] % capacity == slot:
                records[fields[3]] = fields
    return records
