"""What is wanted beside a ratio of IOPS to QEMU's in one case: of two cases, of latency, of processor time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from bench.comparison import Comparison
from bench.measurement import Measurement
from bench.ratio import Ratio

LESS_IS_BETTER = ("p99", "cpu_per_100k")
NAMES = {"iops": "IOPS", "p99": "p99", "cpu_per_100k": "CPU a request"}


@dataclass(frozen=True, slots=True)
class Goal:
    """*bound*: of our *field* in *case* to the best of *others*, which are (server, case); else to QEMU's there."""

    case: str
    bound: float
    field: str = "iops"
    others: tuple[tuple[str, str], ...] = ()

    @property
    def against(self) -> tuple[tuple[str, str], ...]:
        return self.others or (("QEMU", self.case),)

    @property
    def cases(self) -> set[str]:
        """All that must be measured for it."""
        return {self.case, *(case for _, case in self.against)}

    def judge(self, found: Mapping[str, Comparison]) -> tuple[Ratio, str] | None:
        """The ratio, pair by pair, and a verdict; None if a case is missing."""
        if not self.cases <= found.keys():
            return None
        mine = self._values(found[self.case].ours)
        ratios = [Ratio.of_pairs(*_as_long(mine, self._values(_runs(found, other)))) for other in self.against]
        if self.field in LESS_IS_BETTER:
            ratio = max(ratios, key=lambda ratio: ratio.median)
            return ratio, "reached" if ratio.median <= self.bound else "missed"
        ratio = min(ratios, key=lambda ratio: ratio.median)
        return ratio, "reached" if ratio.median >= self.bound else "missed"

    def _values(self, runs: tuple[Measurement, ...]) -> list[float]:
        return [getattr(run, self.field) for run in runs]


def _runs(found: Mapping[str, Comparison], other: tuple[str, str]) -> tuple[Measurement, ...]:
    server, case = other
    return found[case].theirs if server == "QEMU" else found[case].ours


def _as_long(mine: list[float], other: list[float]) -> tuple[list[float], list[float]]:
    """Of runs of two cases as many as both have."""
    length = min(len(mine), len(other))
    return mine[:length], other[:length]


def _beside(case: str, plain: str, bound: float) -> Goal:
    return Goal(case, bound, others=(("ours", plain),))


GOALS = (
    *(Goal(case, 1, "p99") for case in ("queues-4", "overlay-write-1", "overlay-write-32")),
    *(Goal(f"sequential-{way}", 0.8, "cpu_per_100k") for way in ("read", "write", "read-cached", "write-cached")),
    Goal("parts-overlay-32", 3, others=(("QEMU", "parts-overlay-32"), ("QEMU", "plain-overlay-32"))),
    *(_beside(f"parts-overlay-{depth}", f"plain-overlay-{depth}", 1) for depth in (1, 32)),
    *(
        _beside(f"{kind}-{way}-32", f"{way}-32", 0.95)
        for kind in ("parts", "data-file", "raw-data-file")
        for way in ("read", "overwrite")
    ),
    *(_beside(f"luks-{way}-32", f"{way}-32", 0.75) for way in ("read", "overwrite")),
    _beside("bitmaps-overwrite-32", "overwrite-32", 0.98),
)


def needed() -> set[str]:
    """The cases that some goal compares."""
    return set().union(*(goal.cases for goal in GOALS))


def lines(found: Mapping[str, Comparison]) -> Iterator[str]:
    """A table of the goals whose cases were measured; nothing if there is none."""
    judged = [(goal, *verdict) for goal in GOALS if (verdict := goal.judge(found))]
    if not judged:
        return
    yield "| case | figure | to the best of | ratio | wanted | verdict |"
    yield "|---|---|---|--:|--:|---|"
    for goal, ratio, judgement in judged:
        others = ", ".join(f"{server} {case}" for server, case in goal.against)
        wanted = f"{'<=' if goal.field in LESS_IS_BETTER else '>='} {goal.bound:g}"
        yield f"| {goal.case} | {NAMES[goal.field]} | {others} | {ratio} | {wanted} | {judgement} |"
    yield ""
