"""What may be on the disk at one moment: disks told apart by a digest, each one a difference to what is stable.

The digest of a disk is the sum of its sectors' hashes, so that a change costs what it changes; equal digests are taken
for equal disks (64 bits).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from tests.crash.driver import SECTOR, ZEROS, Effect, SimulatedFile, split_sectors

MASK = (1 << 64) - 1


def weight(sector: int, data: bytes) -> int:
    """What a sector adds to the digest; zeros add nothing."""
    return 0 if data == ZEROS else hash((sector, data))


@dataclass(frozen=True, slots=True)
class Unit:
    """What a death keeps or loses as a whole: an operation, or one sector of its write."""

    name: str
    effect: Effect


@dataclass(slots=True)
class Disk:
    """A disk as it differs from a stable one; *kept* names the units that reached it, *states* counts its likes."""

    changes: dict[int, bytes]
    size: int
    digest: int
    kept: tuple[str, ...] = ()
    states: int = 1

    def with_unit(self, stable: SimulatedFile, unit: Unit) -> "Disk":
        """The disk after *unit* has reached it, too."""
        disk = Disk(dict(self.changes), self.size, self.digest, (*self.kept, unit.name), self.states)
        disk.take(stable, unit.effect)
        return disk

    def take(self, stable: SimulatedFile, effect: Effect) -> None:
        """Let *effect* happen."""
        match effect.kind:
            case "write":
                self._write(stable, effect)
            case "zero":
                self._clear(stable, effect.host_offset, min(effect.host_offset + effect.nbytes, self.size))
            case "resize":
                if effect.nbytes < self.size:
                    self._clear(stable, effect.nbytes, self.size)
                self.size = effect.nbytes

    def sector(self, stable: SimulatedFile, sector: int) -> bytes:
        """What it holds."""
        found = self.changes.get(sector)
        return stable.sectors.get(sector, ZEROS) if found is None else found

    def _put(self, stable: SimulatedFile, sector: int, data: bytes) -> None:
        self.digest += weight(sector, data) - weight(sector, self.sector(stable, sector))
        self.changes[sector] = data

    def _write(self, stable: SimulatedFile, effect: Effect) -> None:
        for sector, (start, data) in split_sectors(effect.host_offset, effect.data):
            if len(data) == SECTOR:
                self._put(stable, sector, data)
            else:
                old = self.sector(stable, sector)
                self._put(stable, sector, old[:start] + data + old[start + len(data) :])
        self.size = max(self.size, effect.host_offset + len(effect.data))

    def _clear(self, stable: SimulatedFile, start: int, end: int) -> None:
        """Zeros there; only sectors that hold something are looked at if the range is long."""
        first, last = start // SECTOR, -(-end // SECTOR)
        if last - first > 2048:
            sectors: Iterable[int] = [s for s in {*stable.sectors, *self.changes} if first <= s < last]
        else:
            sectors = range(first, last)
        for sector in sectors:
            old = self.sector(stable, sector)
            if old == ZEROS:
                continue
            head, tail = max(0, start - sector * SECTOR), min(SECTOR, end - sector * SECTOR)
            self._put(stable, sector, old[:head] + bytes(tail - head) + old[tail:])

    def identity(self) -> int:
        """Equal for equal disks."""
        return hash((self.digest & MASK, self.size))

    def file(self, stable: SimulatedFile) -> SimulatedFile:
        """The disk as a file of its own."""
        sectors = {**stable.sectors, **self.changes}
        for sector, data in self.changes.items():
            if data == ZEROS:
                del sectors[sector]
        return SimulatedFile(stable.path, sectors, self.size)


def whole(file: SimulatedFile) -> Disk:
    """*file* as it is."""
    return Disk({}, file.size, sum(weight(sector, data) for sector, data in file.sectors.items()))


def doubled(disks: dict[int, Disk], stable: SimulatedFile, unit: Unit) -> dict[int, Disk]:
    """*disks* by identity, each with and without *unit*; equal ones counted together."""
    result = dict(disks)
    for disk in disks.values():
        merge(result, disk.with_unit(stable, unit))
    return result


def merge(disks: dict[int, Disk], disk: Disk) -> None:
    """Add *disk* to *disks*, or its count to its equal there."""
    equal = disks.get(identity := disk.identity())
    if equal is None:
        disks[identity] = disk
    else:
        disks[identity] = Disk(equal.changes, equal.size, equal.digest, equal.kept, equal.states + disk.states)


def reached(base: Disk, stable: SimulatedFile, units: Iterable[Unit]) -> Disk:
    """*base* after all *units* have reached it."""
    disk = Disk(dict(base.changes), base.size, base.digest, (*base.kept, *(unit.name for unit in units)), base.states)
    for unit in units:
        disk.take(stable, unit.effect)
    return disk
