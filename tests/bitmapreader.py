"""Persistent bitmaps read straight from an image file, as the format describes them; none of the engine's code."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

EXTENSION = 0x23852875
IN_USE, AUTO = 1, 2


@dataclass(frozen=True)
class Bitmap:
    """One bitmap of the directory."""

    name: str
    flags: int
    granularity: int
    dirty: frozenset[int]  # numbers of its bits that are set

    @property
    def is_valid(self) -> bool:
        return not self.flags & IN_USE

    def sectors(self) -> set[int]:
        """The dirty sectors of 512 bytes, as far as the granules go."""
        per_granule = self.granularity // 512
        return {bit * per_granule + index for bit in self.dirty for index in range(per_granule)}


def bitmaps_of(path: Path, *, is_padded: bool = False) -> dict[str, Bitmap]:
    """The bitmaps of the image at *path* by name; none if a program without them has written to it.

    *is_padded*: there may be bits past the end of the disk, as QEMU makes them of an entry that says all ones.
    """
    with path.open("rb") as file:

        def read(offset: int, nbytes: int) -> bytes:
            file.seek(offset)
            return file.read(nbytes).ljust(nbytes, b"\0")

        return read_bitmaps(read, is_padded=is_padded)


def read_bitmaps(read: Callable[[int, int], bytes], *, is_padded: bool = False) -> dict[str, Bitmap]:
    """The bitmaps of the image that *read(offset, nbytes)* shows."""
    header = read(0, 112)
    (cluster_bits,), (size,) = struct.unpack_from(">I", header, 20), struct.unpack_from(">Q", header, 24)
    (version,), (length,) = struct.unpack_from(">I", header, 4), struct.unpack_from(">I", header, 100)
    if version < 3 or not header[95] & 1:
        return {}
    offset = length
    while True:
        magic, nbytes = struct.unpack(">II", read(offset, 8))
        if magic == EXTENSION:
            break
        if magic == 0:
            raise ValueError("autoclear bit 0 without bitmaps")
        offset += 8 + nbytes + -nbytes % 8
    count, _, _, directory = struct.unpack(">IIQQ", read(offset + 8, 24))
    found = {}
    for _ in range(count):
        table, nentries, flags, kind, bits, name_size, extra = struct.unpack(">QIIBBHI", read(directory, 24))
        assert kind == 1
        name = read(directory + 24 + extra, name_size).decode()
        dirty = _dirty(read, table, nentries, cluster_bits, -(-size >> bits), is_padded=is_padded)
        per_cluster = 8 << cluster_bits
        if not flags & IN_USE:
            nbits = -(-size >> bits)
            assert nentries == max(1, -(-nbits // per_cluster)), "a table of another disk"
        found[name] = Bitmap(name, flags, 1 << bits, dirty)
        directory += 24 + extra + name_size + -(extra + name_size) % 8
    return found


def _dirty(
    read: Callable[[int, int], bytes], table: int, nentries: int, cluster_bits: int, nbits: int, *, is_padded: bool
) -> frozenset[int]:
    dirty: set[int] = set()
    per_cluster = 8 << cluster_bits
    for index in range(nentries):
        (entry,) = struct.unpack(">Q", read(table + 8 * index, 8))
        if entry == 1:
            dirty.update(range(index * per_cluster, min(nbits, (index + 1) * per_cluster)))
        elif entry:
            content = read(entry, 1 << cluster_bits)
            for at, byte in enumerate(content):
                if byte:
                    dirty.update(index * per_cluster + at * 8 + bit for bit in range(8) if byte >> bit & 1)
    inside = frozenset(bit for bit in dirty if bit < nbits)
    assert is_padded or inside == dirty, "a bit past the end of the disk"
    return inside
