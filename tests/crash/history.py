"""What the laws allow each guest sector to hold after a death: the judge of the crash explorer.

Every write carries content that names its request and its sector, so that a sector found on the disk tells which
request wrote it. A version is *superseded* when a later one, begun after it was acknowledged, must have survived.
"""

from dataclasses import dataclass, field

SECTOR = 512
ZEROS = bytes(SECTOR)
SIZE = -1  # the sector that stands for the size of the disk


def pattern(request: int, sector: int) -> bytes:
    """The content of *sector* as written by *request*; never zeros, never the same for two pairs."""
    return (b"R%07d" % request + b"S%07d" % sector) * (SECTOR // 16)


def size_sector(nbytes: int) -> bytes:
    """What stands for a disk of *nbytes*."""
    return (b"%15d\n" % nbytes) * (SECTOR // 16)


@dataclass(slots=True)
class Version:
    """One value a sector was given, when that began and when it was acknowledged (journal positions)."""

    content: bytes
    begun: int
    acked: int | None = None
    binding: bool = True  # False: a hint (discard) that need not have happened
    is_stable: bool = False  # True: stable as soon as it is acknowledged, in every cache mode


@dataclass(slots=True)
class Flush:
    """One FLUSH request."""

    begun: int
    acked: int | None = None


@dataclass
class History:
    """All versions of all sectors of one run."""

    initial: bytes
    writethrough: bool = False
    versions: dict[int, list[Version]] = field(default_factory=dict)
    flushes: list[Flush] = field(default_factory=list)
    beyond: dict[int, bytes] = field(default_factory=dict)  # sectors outside of the initial content

    def before(self, sector: int) -> bytes:
        """What the sector held at the start; zeros past the end of the initial content."""
        if sector in self.beyond:
            return self.beyond[sector]
        return self.initial[sector * SECTOR : (sector + 1) * SECTOR].ljust(SECTOR, b"\0")

    def nonzero(self) -> list[int]:
        """The sectors that held something at the start."""
        inside = range(len(self.initial) // SECTOR)
        return [*self.beyond, *(sector for sector in inside if self.before(sector) != ZEROS)]

    def begin(self, contents: dict[int, bytes], position: int, *, binding: bool = True) -> list[Version]:
        """Note that a request begins to give sectors these contents; the caller sets `acked` on what is returned."""
        fresh = []
        for sector, content in contents.items():
            version = Version(content, position, binding=binding)
            self.versions.setdefault(sector, [Version(self.before(sector), -2, -1)]).append(version)
            fresh.append(version)
        return fresh

    def allowed(self, sector: int, position: int, *, power: bool) -> set[bytes]:
        """The contents *sector* may have after a death when *position* journal entries had happened."""
        known = self.versions.get(sector)
        if known is None:
            return {self.before(sector)}
        seen = [version for version in known if version.begun < position]
        return {seen[index].content for index in self._survivors(seen, position, power=power)}

    def shown(self, sector: int, begun: int, ended: int) -> set[bytes]:
        """The contents that a read of *sector* between these two positions, without a death, may have found."""
        known = self.versions.get(sector)
        if known is None:
            return {self.before(sector)}
        seen = [version for version in known if version.begun < ended]
        return {seen[index].content for index in self._survivors(seen, begun, power=False)}

    def allowed_everywhere(self, position: int, *, power: bool) -> dict[int, set[bytes]]:
        """`allowed` of every sector that a request was for; sectors of the same requests are decided together."""
        alike: dict[tuple[int, ...], list[int]] = {}
        result = {}
        for sector, known in self.versions.items():
            seen = [version for version in known if version.begun < position]
            key = tuple(version.begun for version in seen)
            survivors = alike.get(key)
            if survivors is None:
                survivors = alike[key] = self._survivors(seen, position, power=power)
            result[sector] = {seen[index].content for index in survivors}
        return result

    def _survivors(self, seen: list[Version], position: int, *, power: bool) -> list[int]:
        """Which of *seen* may be there."""
        durable = [version.begun for version in seen if self._survives(version, position, power=power)]
        newest = max(durable, default=-2)
        return [index for index, version in enumerate(seen) if version.acked is None or version.acked >= newest]

    def _survives(self, version: Version, position: int, *, power: bool) -> bool:
        acked = version.acked
        if not version.binding or acked is None or acked >= position:
            return False
        if not power or self.writethrough or version.is_stable or acked < 0:
            return True
        return any(flush.acked is not None and flush.acked < position and acked < flush.begun for flush in self.flushes)
