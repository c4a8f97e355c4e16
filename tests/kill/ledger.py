"""What each sector of the disk may hold: the last acknowledged content, and what may have come over it unacknowledged.

A sector that was written says so: its own number, the version (one a write), a checksum. A sector that is lost is
named by what was found instead: another sector's bytes, an old version, garbage.
"""

import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

SECTOR = 512
ZEROS = bytes(SECTOR)
WORD = struct.Struct("<4sIQQII")  # mark, checksum of what follows, sector, version, their complements; 16 fill a sector
MARK = b"KILL"
CHUNK = 64 * SECTOR  # compared at once while nothing differs


class Lost(AssertionError):
    """A sector holds what nothing allows."""


def sector_content(sector: int, version: int) -> bytes:
    """What the write *version* puts into *sector*."""
    body = struct.pack("<QQII", sector, version, ~sector & 0xFFFFFFFF, ~version & 0xFFFFFFFF)
    return (MARK + struct.pack("<I", zlib.crc32(body)) + body) * (SECTOR // WORD.size)


def describe(content: bytes) -> str:
    """A sector's content in a few words."""
    if content == ZEROS:
        return "zeros"
    words = {content[at : at + WORD.size] for at in range(0, SECTOR, WORD.size)}
    told = {describe_word(word) for word in words}
    return " and ".join(sorted(told)) if len(told) < 3 else f"garbage {content[:32].hex()}"


def describe_word(word: bytes) -> str:
    mark, checksum, sector, version, _, _ = WORD.unpack(word)
    if mark != MARK or checksum != zlib.crc32(word[8:]):
        return f"not ours ({word[:16].hex()})"
    return f"version {version} of sector {sector}"


class Ledger:
    """The disk as the guest knows it. Changes of one sector never overlap in time, so its history is a line."""

    def __init__(self, contents: bytes | bytearray) -> None:
        self.contents = bytearray(contents)  # acknowledged
        self.possible: dict[int, set[bytes]] = {}  # sector: what may be there instead
        self.version = 0
        self.begun: set[int] = set()  # sectors that were ever asked to change
        self.acknowledged: set[int] = set()  # of them, which were written or zeroed
        self._lock = threading.Lock()
        self._moments: list[Ledger] = []  # that are not over

    @property
    def nsectors(self) -> int:
        return len(self.contents) // SECTOR

    def draft(self, first: int, nsectors: int) -> bytes:
        """The content of a new write."""
        self.version += 1
        return b"".join(sector_content(sector, self.version) for sector in range(first, first + nsectors))

    def begin(self, first: int, content: bytes) -> None:
        """*content* may be on the disk from now on, sector by sector."""
        with self._lock:
            for ledger in (self, *self._moments):
                ledger._begin(first, content)

    def _begin(self, first: int, content: bytes) -> None:
        self.begun.update(range(first, first + len(content) // SECTOR))
        for index in range(len(content) // SECTOR):
            one = content[index * SECTOR : (index + 1) * SECTOR]
            self.possible.setdefault(first + index, set()).add(one)

    def acknowledge(self, first: int, content: bytes) -> None:
        """*content* is on the disk, and nothing else."""
        with self._lock:
            self._acknowledge(first, content)

    def _acknowledge(self, first: int, content: bytes) -> None:
        self.acknowledged.update(range(first, first + len(content) // SECTOR))
        self.contents[first * SECTOR : first * SECTOR + len(content)] = content
        for sector in range(first, first + len(content) // SECTOR):
            self.possible.pop(sector, None)

    @contextmanager
    def moment(self) -> Iterator["Ledger"]:
        """What the disk may hold at some moment of this context; for another thread than the guest's."""
        with self._lock:
            then = Ledger(self.contents)
            then.possible = {sector: set(contents) for sector, contents in self.possible.items()}
            self._moments.append(then)
        try:
            yield then
        finally:
            with self._lock:
                self._moments.remove(then)

    def settle(self, found: bytes) -> None:
        """Nothing is in flight and *found* is what the disk holds: it must be allowed, and is what counts from now on.

        Raises: Lost.
        """
        self.judge(found)
        self.contents[:] = found
        self.possible.clear()

    def judge(self, found: bytes) -> None:
        """*found* is what the disk holds now: it must be allowed. Raises: Lost."""
        assert len(found) == len(self.contents)
        for start in range(0, len(found), CHUNK):
            if found[start : start + CHUNK] != self.contents[start : start + CHUNK]:
                for sector in range(start // SECTOR, min(start + CHUNK, len(found)) // SECTOR):
                    self._judge(sector, found[sector * SECTOR : (sector + 1) * SECTOR])

    def _judge(self, sector: int, found: bytes) -> None:
        acknowledged = bytes(self.contents[sector * SECTOR : (sector + 1) * SECTOR])
        allowed = {acknowledged, *self.possible.get(sector, ())}
        if found not in allowed:
            names = ", ".join(sorted(map(describe, allowed)))
            raise Lost(f"sector {sector} holds {describe(found)}; allowed: {names}")
