"""Counters and latencies as OpenMetrics text, for whoever scrapes them."""

from collections.abc import Iterator

from ring.counter import Counters
from ring.statistics import Histogram, Statistics

PREFIX = "vhost_user_qcow2"
FIRST_BOUND, LAST_BOUND = 10, 36  # 2**i ns: from 1 us to 69 s


def open_metrics(counters: Counters, statistics: Statistics) -> str:
    """The exposition, from `# TYPE` to `# EOF`."""
    lines: list[str] = []
    for name, value in vars(counters).items():
        lines += [f"# TYPE {PREFIX}_{name} counter", f"{PREFIX}_{name}_total {value}"]
    lines.append(f"# TYPE {PREFIX}_stage_seconds histogram")
    for stage in ("data", "metadata", "sync"):
        lines += _histogram("stage_seconds", f'stage="{stage}"', getattr(statistics, stage))
    for kind in ("wait", "service"):
        lines.append(f"# TYPE {PREFIX}_queue_{kind}_seconds histogram")
        for index, queue in statistics.queues.items():
            lines += _histogram(f"queue_{kind}_seconds", f'queue="{index}"', getattr(queue, kind))
    return "\n".join([*lines, "# EOF", ""])


def _histogram(name: str, label: str, histogram: Histogram) -> Iterator[str]:
    for i in range(FIRST_BOUND, LAST_BOUND + 1):
        below = sum(histogram.buckets[: i + 1])
        yield f'{PREFIX}_{name}_bucket{{{label},le="{(1 << i) / 1e9!r}"}} {below}'
    yield f'{PREFIX}_{name}_bucket{{{label},le="+Inf"}} {histogram.count}'
    yield f"{PREFIX}_{name}_sum{{{label}}} {histogram.nanoseconds / 1e9!r}"
    yield f"{PREFIX}_{name}_count{{{label}}} {histogram.count}"
