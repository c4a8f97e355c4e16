"""A run in full: as JSON for machines, as a table for people."""

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.comparison import Comparison
from bench.goal import lines
from bench.machine import Machine
from bench.measurement import Measurement
from bench.ratio import Ratio

FORMAT = 1
BUSY = 0.05  # share of the machine in other hands from which on a figure is doubtful
TIMED = ("iops", "p50", "p99", "p999", "cpu_per_100k")
COUNTED = ("syncs_per_1000", "metadata_per_1000")


@dataclass(frozen=True, slots=True)
class Run:
    """Everything one invocation found."""

    machine: Machine
    command: str
    pairs: int
    seconds: float
    ceilings: dict[str, float]
    comparisons: tuple[Comparison, ...]
    idle: dict[str, float]  # by server: share of one core that it takes while nobody asks for anything


def ratio_of(comparison: Comparison) -> Ratio:
    return Ratio.of_pairs([run.iops for run in comparison.ours], [run.iops for run in comparison.theirs])


def share_of(comparison: Comparison, field: str) -> float:
    """Our share of their figure, of which less is better: the median over pairs."""
    return Ratio.of_pairs(
        *([getattr(run, field) for run in runs] for runs in (comparison.ours, comparison.theirs))
    ).median


def median_of(runs: Sequence[Measurement], field: str) -> float | None:
    """The median of a figure over *runs*; None if the server does not say."""
    values = [value for run in runs if (value := getattr(run, field)) is not None]
    return statistics.median(values) if values else None


def disturbance(comparison: Comparison) -> float:
    """The largest share of the machine that others had during a run."""
    return max(run.others_busy for run in (*comparison.ours, *comparison.theirs))


def write_json(run: Run, path: Path) -> None:
    path.write_text(json.dumps(as_json(run), indent=1) + "\n")


def as_json(run: Run) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": run.command,
        "machine": asdict(run.machine),
        "pairs": run.pairs,
        "seconds": run.seconds,
        "ceilings": run.ceilings,
        "idle": run.idle,
        "cases": [_case_as_json(comparison, run.ceilings) for comparison in run.comparisons],
    }


def _case_as_json(comparison: Comparison, ceilings: dict[str, float]) -> dict[str, Any]:
    case, ratio = comparison.case, ratio_of(comparison)
    job = asdict(case.job) | {"kind": case.job.kind.name.lower(), "order": case.job.order.name.lower()}
    return {
        "name": case.name,
        "title": case.title,
        "image": case.recipe.name,
        "cache": case.cache.name.lower(),
        "storage": "tmpfs" if case.on_tmpfs else "disk",
        "job": job,
        "target": case.target,
        "ratio": asdict(ratio),
        "verdict": ratio.verdict(case.target),
        "limit": ceilings.get(case.limit) if case.limit else None,
        "aio": comparison.aio.value,
        "aio_trials": comparison.trials,
        "ours": [asdict(run) for run in comparison.ours],
        "qemu": [asdict(run) for run in comparison.theirs],
        "qemu_traced": asdict(comparison.traced) if comparison.traced else None,
    }


def write_tables(run: Run, directory: Path) -> None:
    """Write results.json and table.md."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(run, directory / "results.json")
    (directory / "table.md").write_text(markdown(run))


def markdown(run: Run) -> str:
    """The tables, with what must be known to read them."""
    return "\n".join(
        [
            *_preface(run),
            *_ratios(run),
            "",
            *lines({comparison.case.name: comparison for comparison in run.comparisons}),
            *_details(run),
            "",
            *_memory(run),
            *_idle(run),
            *_ceilings(run),
            "",
        ]
    )


def _preface(run: Run) -> Iterator[str]:
    machine = run.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    yield "# vhost-user-qcow2 against qemu-storage-daemon"
    yield ""
    yield f"`{run.command}`, commit {machine.commit}: {_pairs(run)} interleaved pairs of {run.seconds:g} s each."
    yield f"{machine.processor}, {machine.cores} cores, {machine.memory_gib:g} GiB, Linux {machine.kernel},"
    yield f"{machine.file_system}; {versions}; load average {machine.load_average} at the start."
    yield "Ratios are medians over pairs, with the lowest and highest pair. Within noise: pairs disagree."
    yield "Of p99 and processor time a request, ours are given as a share of QEMU's: less is better."
    yield ""


def _pairs(run: Run) -> str:
    """How many: in parts of a run there may have been more or less."""
    numbers = {len(comparison.ours) for comparison in run.comparisons} or {run.pairs}
    return f"{min(numbers)} to {max(numbers)}" if len(numbers) > 1 else str(*numbers)


def _ratios(run: Run) -> Iterator[str]:
    figures = "| case | ours, IOPS | QEMU, IOPS | ratio | at least | verdict | p99 | CPU a request "
    yield f"{figures}| the disk alone | others' load |"
    yield "|---|--:|--:|--:|--:|---|--:|--:|--:|--:|"
    for comparison in run.comparisons:
        case, ratio, busy = comparison.case, ratio_of(comparison), disturbance(comparison)
        ours, theirs = (median_of(runs, "iops") for runs in (comparison.ours, comparison.theirs))
        cells = [
            f"{case.name}: {case.title}",
            figure(ours),
            f"{figure(theirs)} ({comparison.aio.value})",
            str(ratio),
            "" if case.target is None else f"{case.target:g}",
            ratio.verdict(case.target),
            *(f"{share_of(comparison, field):.2f}" for field in ("p99", "cpu_per_100k")),
            _beside_the_disk(ours, run.ceilings.get(case.limit)) if case.limit else "",
            f"{busy:.0%}{' (!)' if busy > BUSY else ''}",
        ]
        yield row(cells)


def _beside_the_disk(ours: float | None, alone: float | None) -> str:
    """What the disk has alone, and our share of it."""
    return f"{figure(alone)}, {ours / alone:.0%}" if ours and alone else ""


def _details(run: Run) -> Iterator[str]:
    yield (
        "| case | server | IOPS | p50, us | p99, us | p99.9, us | CPU s per 100k "
        "| fdatasyncs per 1,000 writes | metadata writes per 1,000 |"
    )
    yield "|---|---|" + "--:|" * len(TIMED + COUNTED)
    for comparison in run.comparisons:
        for name, runs in (("ours", comparison.ours), ("QEMU", comparison.theirs)):
            timed = [figure(median_of(runs, field)) for field in TIMED]
            counted = [figure(median_of(_counting(comparison, runs), field)) for field in COUNTED]
            yield row([comparison.case.name, name, *timed, *counted])


def _counting(comparison: Comparison, runs: Sequence[Measurement]) -> Sequence[Measurement]:
    """Where the counts come from: ours from every run, QEMU's from its traced one."""
    if runs is comparison.ours:
        return runs
    return [comparison.traced] if comparison.traced else []


def _memory(run: Run) -> Iterator[str]:
    """Resident memory without the guest's: before the first request, and the most after a load."""
    ours = [measurement for comparison in run.comparisons for measurement in comparison.ours]
    theirs = [measurement for comparison in run.comparisons for measurement in comparison.theirs]
    if not ours:
        return
    yield "| memory of the server, MiB | ours | QEMU | difference |"
    yield "|---|--:|--:|--:|"
    for label, field, reduce in _MEMORY:
        mine, other = (reduce([getattr(m, field) for m in runs]) / 1024 for runs in (ours, theirs))
        yield row([label, f"{mine:.1f}", f"{other:.1f}", f"{mine - other:+.1f}"])
    yield ""


_MEMORY: tuple[tuple[str, str, Callable[[list[int]], float]], ...] = (
    ("connected, at rest, median", "resident_at_rest_kib", statistics.median),
    ("after a load, median", "resident_kib", statistics.median),
    ("after a load, largest", "resident_kib", max),
)


def _idle(run: Run) -> Iterator[str]:
    if not run.idle:
        return
    yield "| connected and idle | share of one core |"
    yield "|---|--:|"
    for name, share in run.idle.items():
        yield row([name, f"{share:.4%}"])
    yield ""


def _ceilings(run: Run) -> Iterator[str]:
    if not run.ceilings:
        return
    yield "| the disk alone (fio) | IOPS |"
    yield "|---|--:|"
    for name, iops in run.ceilings.items():
        yield row([name, figure(iops)])


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def figure(value: float | None) -> str:
    """Three figures that count; blank if nobody knows."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
