"""The demo's table: one job on two servers of the same disk."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

LABEL_WIDTH, COLUMN_WIDTH = 46, 18


@dataclass(frozen=True)
class FioRun:
    """The figures of one fio job that wrote and then read back everything it wrote."""

    writes_per_second: float
    mean_ms: float
    verified: int

    @classmethod
    def parse(cls, report: str) -> Self:
        """Read fio's JSON report; with --fsync=1 a write is done when its fsync is, so both count."""
        job = json.loads(report)["jobs"][0]
        mean_ns = job["write"]["lat_ns"]["mean"] + job["sync"]["lat_ns"]["mean"]
        return cls(job["write"]["iops"], mean_ns / 1e6, job["read"]["total_ios"])


@dataclass(frozen=True)
class Cost:
    """What the host was asked to do beside reading and writing the guest's data."""

    metadata_writes: int
    syncs: int


@dataclass(frozen=True)
class Outcome:
    """One guest's run: fio's figures, the guest's own count of requests, the host's cost, the judges' verdicts."""

    deep: FioRun
    single: FioRun
    reads: int
    writes: int
    cost: Cost
    allocated_clusters: int
    verdicts: dict[str, str]

    @property
    def is_clean(self) -> bool:
        return all(verdict == "clean" for verdict in self.verdicts.values())


@dataclass(frozen=True)
class Row:
    label: str
    ours: str = ""
    theirs: str = ""


def print_comparison(ours: Outcome, theirs: Outcome) -> None:
    print()
    for row in (Row("", "vhost-user-qcow2", "QEMU's own qcow2"), *_rows(ours, theirs)):
        line = f"{row.label:<{LABEL_WIDTH}}{row.ours:>{COLUMN_WIDTH}}{row.theirs:>{COLUMN_WIDTH}}"
        print(line.rstrip(), flush=True)


def _rows(ours: Outcome, theirs: Outcome) -> Iterator[Row]:
    yield Row("-" * (LABEL_WIDTH + 2 * COLUMN_WIDTH))
    yield from _fio_rows("4 KiB random writes, 32 at a time", ours.deep, theirs.deep)
    yield from _fio_rows("4 KiB random writes, one at a time, with fsync", ours.single, theirs.single)
    yield Row("what the guest was told")
    yield _count("  reads done", ours.reads, theirs.reads)
    yield _count("  writes done, and stable", ours.writes, theirs.writes)
    yield Row("")
    yield Row("what it cost the host")
    yield _count("  clusters allocated", ours.allocated_clusters, theirs.allocated_clusters)
    yield _count("  metadata writes", ours.cost.metadata_writes, theirs.cost.metadata_writes)
    yield _count("  fdatasyncs", ours.cost.syncs, theirs.cost.syncs)
    metadata = [outcome.cost.metadata_writes / outcome.writes for outcome in (ours, theirs)]
    syncs = [outcome.cost.syncs / outcome.writes for outcome in (ours, theirs)]
    yield Row("  metadata writes per write done", *(f"{share:.3f}" for share in metadata))
    yield Row("  fdatasyncs per write done", *(f"{share:.3f}" for share in syncs))
    yield Row("")
    yield Row("the image afterwards")
    for judge, verdict in ours.verdicts.items():
        yield Row(f"  {judge}", verdict, theirs.verdicts[judge])


def _fio_rows(title: str, ours: FioRun, theirs: FioRun) -> Iterator[Row]:
    yield Row(title)
    # No ratios: an emulated guest on few cores is its own limit.
    yield _count("  writes a second", ours.writes_per_second, theirs.writes_per_second)
    yield Row("  a write takes on average", f"{ours.mean_ms:.2f} ms", f"{theirs.mean_ms:.2f} ms")
    yield _count("  blocks read back with the right checksum", ours.verified, theirs.verified)
    yield Row("")


def _count(label: str, ours: float, theirs: float) -> Row:
    return Row(label, f"{ours:,.0f}", f"{theirs:,.0f}")
