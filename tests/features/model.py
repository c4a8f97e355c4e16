"""What a disk, its snapshots and its bitmaps have to hold."""

from dataclasses import dataclass, field

SECTOR = 512


@dataclass
class Bits:
    """What a bitmap says."""

    granularity: int
    is_enabled: bool
    dirty: set[int] = field(default_factory=set)
    perhaps: set[int] = field(
        default_factory=set
    )  # may be reported, too: what a change of the size or a snapshot touched

    def granules(self, offset: int, nbytes: int) -> range:
        return range(offset // self.granularity, -(-(offset + nbytes) // self.granularity)) if nbytes else range(0)


class Model:
    """The bytes of a disk; whether a discarded sector was kept or holds zeros is known when somebody has looked."""

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        self.discarded: set[int] = set()  # numbers of sectors
        self.below = b""  # what shines through where a version 2 image has nothing
        self.snapshots: dict[str, bytes] = {}
        self.bitmaps: dict[str, Bits] = {}
        self.written: set[int] = set()  # sectors that somebody changed since the image was made

    @property
    def nbytes(self) -> int:
        return len(self.content)

    def note(self, offset: int, nbytes: int) -> None:
        """Something may have changed."""
        self.written.update(_sectors(offset, nbytes))
        for bitmap in self.bitmaps.values():
            if bitmap.is_enabled:
                bitmap.dirty.update(bitmap.granules(offset, nbytes))

    def write(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data
        self.discarded.difference_update(_sectors(offset, len(data)))
        self.note(offset, len(data))

    def discard(self, offset: int, nbytes: int) -> None:
        """Let the next look at the disk say what is there."""
        self.discarded.update(_sectors(offset, nbytes))
        self.note(offset, nbytes)

    def take_discard(self, offset: int, seen: bytes) -> None:
        """What was discarded at *offset* reads as *seen*: each byte is what it was or zero. Raises: AssertionError."""
        old = self.content[offset : offset + len(seen)]
        wrong = [at for at, (new, was) in enumerate(zip(seen, old, strict=True)) if new not in (0, was)]
        assert not wrong, f"the discarded byte at {offset + wrong[0]:#x} is neither what it was nor zero"
        self.write(offset, seen)

    def look(self, seen: bytes) -> None:
        """The disk reads as *seen*; a sector that was discarded is what it was, or zeros. Raises: AssertionError."""
        for sector in sorted(self.discarded):
            at = slice(sector * SECTOR, sector * SECTOR + SECTOR)
            if seen[at] != self.content[at]:
                allowed = seen[at] in (bytes(SECTOR), self.below[at])
                assert allowed, f"the discarded sector at {at.start:#x} shows neither its old bytes nor zeros"
                self.content[at] = seen[at]
        self.discarded.clear()
        self.require(seen)

    def require(self, seen: bytes, content: bytes | bytearray | None = None) -> None:
        """*seen* is the disk, or *content*. Raises: AssertionError that names the first difference."""
        wanted = self.content if content is None else content
        assert len(seen) == len(wanted), f"{len(seen)} bytes, not {len(wanted)}"
        if seen != wanted:
            wrong = [at for at in range(0, len(seen), SECTOR) if seen[at : at + SECTOR] != wanted[at : at + SECTOR]]
            is_now, should = (part[wrong[0] : wrong[0] + 16].hex() for part in (seen, bytes(wanted)))
            raise AssertionError(f"{len(wrong)} sectors differ, first at {wrong[0]:#x}: {is_now} is not {should}")

    def resize(self, nbytes: int) -> None:
        """What is new reads as zeros; a bitmap may report it."""
        for bitmap in self.bitmaps.values():
            end = -(-nbytes // bitmap.granularity)
            bitmap.perhaps.update(bitmap.granules(self.nbytes, max(0, nbytes - self.nbytes)))
            bitmap.dirty = {bit for bit in bitmap.dirty if bit < end}
            bitmap.perhaps = {bit for bit in bitmap.perhaps if bit < end}
        del self.content[nbytes:]
        self.content += bytes(nbytes - len(self.content))

    def apply_snapshot(self, name: str) -> None:
        """Be as the disk was; a bitmap may report all of it."""
        self.resize(len(self.snapshots[name]))
        self.content[:] = self.snapshots[name]
        self.discarded.clear()
        for bitmap in self.bitmaps.values():
            bitmap.perhaps.update(bitmap.granules(0, self.nbytes))

    def change_bitmap(self, name: str, how: str) -> None:
        """Remove, clear, enable or disable one."""
        match how:
            case "remove":
                del self.bitmaps[name]
            case "clear":
                self.bitmaps[name].dirty.clear()
                self.bitmaps[name].perhaps.clear()
            case _:
                self.bitmaps[name].is_enabled = how == "enable"

    def merge(self, name: str, source: str) -> None:
        """Let the bitmap *name* say what *source* says, too."""
        into, out = self.bitmaps[name], self.bitmaps[source]
        for bits, more in ((into.dirty, out.dirty), (into.perhaps, out.perhaps)):
            for bit in list(more):
                start = bit * out.granularity
                bits.update(into.granules(start, min(out.granularity, self.nbytes - start)))


def _sectors(offset: int, nbytes: int) -> range:
    return range(offset // SECTOR, -(-(offset + nbytes) // SECTOR)) if nbytes else range(0)
