"""Latencies from the generator's histogram."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Histogram:
    """Counts of bucket *i*, as in `histogram.h`: the first *steps* values one each, then *steps* an octave."""

    steps: int
    counts: Sequence[int] = field(repr=False)

    @property
    def total(self) -> int:
        return sum(self.counts)

    def percentile(self, percent: float) -> int:
        """Nanoseconds that *percent* of the requests did not exceed, rounded up to the end of a bucket; 0 if empty."""
        wanted = self.total * percent / 100
        seen = 0
        for index, count in enumerate(self.counts):
            seen += count
            if count and seen >= wanted:
                return self._end(index)
        return 0

    def buckets(self) -> dict[int, int]:
        """The buckets that are not empty: {last value: count}."""
        return {self._end(index): count for index, count in enumerate(self.counts) if count}

    def _end(self, index: int) -> int:
        if index < self.steps:
            return index
        octave = index // self.steps - 1
        return ((index % self.steps + self.steps + 1) << octave) - 1


def merge(histograms: Sequence[Histogram]) -> Histogram:
    """All requests of several histograms in one."""
    counts = [sum(column) for column in zip(*(histogram.counts for histogram in histograms), strict=True)]
    return Histogram(histograms[0].steps, counts)
