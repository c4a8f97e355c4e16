"""How much faster, and how sure of it we can be."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ours over theirs, pair by pair."""

    median: float
    low: float
    high: float

    @classmethod
    def of_pairs(cls, ours: Sequence[float], theirs: Sequence[float]) -> "Ratio":
        ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"

    def verdict(self, target: float | None) -> str:
        """In words: against *target* if there is one, else against equality; "within noise" when pairs disagree."""
        goal = 1.0 if target is None else target
        words = ("ahead", "behind") if target is None else ("reached", "missed")
        if self.low < goal < self.high:
            return f"within noise ({words[self.median < goal]} by the median)" if target else "within noise"
        return words[self.median < goal]
