"""What the laws allow each guest sector to hold after a death: the judge of the crash explorer.

Every write carries content that names its request and its sector, so that a sector found on the disk tells which
request wrote it. A version is *superseded* when a later one, begun after it was acknowledged, must have survived.
"""

from dataclasses import dataclass, field

SECTOR = 512
ZEROS = bytes(SECTOR)


def pattern(request: int, sector: int) -> bytes:
    """The content of *sector* as written by *request*; never zeros, never the same for two pairs."""
    return (b"R%07d" % request + b"S%07d" % sector) * (SECTOR // 16)


@dataclass(slots=True)
class Version:
    """One value a sector was given, when that began and when it was acknowledged (journal positions)."""

    content: bytes
    begun: int
    acked: int | None = None
    binding: bool = True  # False: a hint (discard) that need not have happened


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

    def before(self, sector: int) -> bytes:
        """What the sector held at the start; zeros past the end of the initial content."""
        return self.initial[sector * SECTOR : (sector + 1) * SECTOR].ljust(SECTOR, b"\0")

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
        durable = [version.begun for version in seen if self._survives(version, position, power=power)]
        newest = max(durable, default=-2)
        return {version.content for version in seen if version.acked is None or version.acked >= newest}

    def _survives(self, version: Version, position: int, *, power: bool) -> bool:
        acked = version.acked
        if not version.binding or acked is None or acked >= position:
            return False
        if not power or self.writethrough or acked < 0:
            return True
        return any(flush.acked is not None and flush.acked < position and acked < flush.begun for flush in self.flushes)
