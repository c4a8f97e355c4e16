"""How much faster, and how sure of it we can be."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

PAIRS_MIN = 3  # fewer show no range worth the name


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ours over theirs, pair by pair."""

    pairs: int
    median: float
    low: float
    high: float

    @classmethod
    def of_pairs(cls, ours: Sequence[float], theirs: Sequence[float]) -> "Ratio":
        ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
        return cls(len(ratios), statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"

    def verdict(self, target: float | None) -> str:
        """In words: against *target* if there is one, else against equality; "within noise" when pairs disagree."""
        goal = 1.0 if target is None else target
        words = ("ahead", "behind") if target is None else ("reached", "missed")
        if self.pairs < PAIRS_MIN:
            return f"{words[self.median < goal]}, too few pairs to be sure"
        if self.low < goal < self.high:
            return f"within noise ({words[self.median < goal]} by the median)" if target else "within noise"
        return words[self.median < goal]
