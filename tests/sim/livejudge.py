"""What a death may leave of a disk that somebody works on: its content, and what its bitmaps say of it (law 11)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.bitmapreader import Bitmap
from tests.crash.history import SECTOR, SIZE, ZEROS, History, Version
from tests.crash.opening import Seen
from tests.crash.walk import Allowed, Judge
from tests.sim.liveledger import Kept, Ledger
from tests.sim.trouble import Violation


@dataclass(frozen=True, slots=True)
class Said:
    """The sectors that valid bitmaps report, by name: what another program finds, and what our next open leaves."""

    before: Mapping[str, frozenset[int]]
    after: Mapping[str, frozenset[int]]
    granularities: Mapping[str, int]  # in sectors

    @classmethod
    def of(cls, before: Mapping[str, Bitmap], after: Mapping[str, Bitmap]) -> "Said":
        """What the file held before it was opened, and once it was closed."""
        grains = {name: bitmap.granularity // SECTOR for name, bitmap in after.items()}
        return cls(_sectors(before), _sectors(after), grains)


def _sectors(bitmaps: Mapping[str, Bitmap]) -> dict[str, frozenset[int]]:
    return {name: frozenset(bitmap.sectors()) for name, bitmap in bitmaps.items() if bitmap.is_valid}


class LiveJudge(Judge):
    """Judges by *history*, and by what is promised in *ledger*."""

    def __init__(self, history: History, entries: Sequence[object], ledger: Ledger) -> None:
        super().__init__(history, entries)
        self._ledger = ledger
        self._then: dict[int, Allowed] = {}  # what the disk may have held at a position

    def judge_bitmaps(self, seen: Seen, said: Said, top: str, position: int, *, power: bool) -> None:
        """Raises: Violation if a bitmap of *top*, which is served, says too little; or, after a kill, too much."""
        for kept in self._ledger.bitmaps:
            if kept.holds(top, position):
                self._require_covered(kept, seen, said)
                if not power:
                    self._require_exact(kept, said)

    def _require_covered(self, kept: Kept, seen: Seen, said: Said) -> None:
        if kept.name not in said.before or kept.name not in said.after:
            raise Violation(f"bitmap {kept.name} of {kept.path} is not there, or worth nothing")
        reported = said.before[kept.name] & said.after[kept.name]
        then = self._then.get(kept.covers)
        if then is None:
            then = self._then[kept.covers] = self.history.allowed_everywhere(kept.covers, power=False)
        for sector, allowed in then.items():
            if sector not in reported and sector != SIZE and seen.get(sector, ZEROS) not in allowed:
                raise Violation(f"sector {sector} has changed since {kept.covers}, and {kept.name} does not say so")

    def _require_exact(self, kept: Kept, said: Said) -> None:
        per_granule = max(said.granularities[kept.name], kept.grain // SECTOR)
        for granule in {sector // per_granule for sector in said.after[kept.name]}:
            sectors = range(granule * per_granule, (granule + 1) * per_granule)
            if not any(self._is_changed(sector, kept.exact) for sector in sectors):
                raise Violation(f"{kept.name} reports sector {sectors.start}, not changed since {kept.exact}")

    def _is_changed(self, sector: int, since: int) -> bool:
        return any(_ends_after(version, since) for version in self.history.versions.get(sector, ()))


def _ends_after(version: Version, position: int) -> bool:
    return version.acked is None or version.acked >= position
