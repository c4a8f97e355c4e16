"""Pictures of a run, as SVG; matplotlib draws them and is needed for nothing else."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.comparison import Comparison
from bench.report import median_of, ratio_of
from bench.sweep import Sweep

if TYPE_CHECKING:
    from bench.crowd import Curve
    from bench.measurement import Measurement

SERVERS = (("vhost-user-qcow2", "tab:blue"), ("qemu-storage-daemon", "tab:gray"))


class NoPlots(Exception):
    """matplotlib is not installed."""


def draw(comparisons: Sequence[Comparison], sweeps: Sequence[Sweep], directory: Path) -> list[Path]:
    """Draw the ratios of all cases, and each sweep that was measured -> the files. Raises: NoPlots."""
    _prepare()
    found = {comparison.case.name: comparison for comparison in comparisons}
    in_sweeps = {case.name for sweep in sweeps for _, case in sweep.points}
    single = [comparison for comparison in comparisons if comparison.case.name not in in_sweeps]
    files = [_draw_ratios(single, directory / "ratios.svg")] if single else []
    for sweep in sweeps:
        points = [(x, found[case.name]) for x, case in sweep.points if case.name in found]
        if points:
            paint = _draw_cost if sweep.shows_cost else _draw_sweep
            files.append(paint(sweep, points, directory / f"{sweep.name}.svg"))
    return files


def draw_crowds(curves: "Sequence[Curve]", floor: float, path: Path) -> None:
    """Draw each case's rate, with its range, as a share of its best along the requests under way. Raises: NoPlots."""
    _prepare()
    figure, axes = _new_figure(height=4.5)
    crowds = [point.crowd for point in curves[0].figures]
    for curve in curves:
        best = max(point.rate for point in curve.figures)
        (line,) = axes.plot(crowds, [point.rate / best for point in curve.figures], marker="o", markersize=3)
        line.set_label(f"{curve.case.title}: {best:,.0f}")
        low, high = ([reach(point.rates) / best for point in curve.figures] for reach in (min, max))
        axes.fill_between(crowds, low, high, color=line.get_color(), alpha=0.15)
    axes.axhline(floor, color="tab:red", linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(crowds, [f"{crowd:,}" for crowd in crowds], rotation=45)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("requests of 4 KiB under way")
    axes.set_ylabel("requests a second of processor time, of the best")
    axes.legend(loc="lower right", fontsize="small")
    _save(figure, path)


def _prepare() -> None:
    try:
        import matplotlib  # type: ignore[import-not-found, unused-ignore]  # an extra
    except ImportError:
        raise NoPlots("no plots: matplotlib is not installed (pip install '.[bench]')") from None
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "bench"  # the same figures, the same bytes


def _draw_ratios(comparisons: Sequence[Comparison], path: Path) -> Path:
    figure, axes = _new_figure(height=1 + 0.35 * len(comparisons))
    for y, comparison in enumerate(reversed(comparisons)):
        ratio = ratio_of(comparison)
        reach = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
        axes.barh(y, ratio.median, xerr=reach, color=SERVERS[0][1], ecolor="black", height=0.6)
        if comparison.case.target is not None:
            axes.plot([comparison.case.target] * 2, [y - 0.45, y + 0.45], color="tab:red")
    axes.axvline(1, color=SERVERS[1][1])
    axes.set_xscale("log")
    axes.set_yticks(range(len(comparisons)), [comparison.case.name for comparison in reversed(comparisons)])
    axes.set_xlabel("IOPS, times QEMU's; range over pairs; red: at least")
    return _save(figure, path)


def _draw_sweep(sweep: Sweep, points: Sequence[tuple[float, Comparison]], path: Path) -> Path:
    figure, axes = _new_figure(height=4)
    x = [place for place, _ in points]
    for (name, color), runs in zip(SERVERS, ([c.ours for _, c in points], [c.theirs for _, c in points]), strict=True):
        medians = [median_of(series, "iops") or 0.0 for series in runs]
        axes.plot(x, medians, marker="o", color=color, label=name)
        axes.fill_between(x, *_extremes(runs), color=color, alpha=0.2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [f"{place:g}" for place in x])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(sweep.label)
    axes.set_ylabel("IOPS")
    axes.set_title(sweep.title)
    axes.legend()
    return _save(figure, path)


def _draw_cost(sweep: Sweep, points: Sequence[tuple[float, Comparison]], path: Path) -> Path:
    figure, axes = _new_figure(height=4)
    batches = [median_of(comparison.ours, "batch") or 0.0 for _, comparison in points]
    costs = [10 * (median_of(comparison.ours, "cpu_per_100k") or 0.0) for _, comparison in points]
    axes.plot(batches, costs, marker="o", color=SERVERS[0][1])
    for (depth, _), batch, cost in zip(points, batches, costs, strict=True):
        axes.annotate(f"depth {depth:g}", (batch, cost), xytext=(4, 4), textcoords="offset points")
    axes.set_ylim(bottom=0)
    axes.set_xlabel(sweep.label)
    axes.set_ylabel("processor time a request, us")
    axes.set_title(sweep.title)
    return _save(figure, path)


def _extremes(runs: Sequence[Sequence["Measurement"]]) -> tuple[list[float], list[float]]:
    return [min(m.iops for m in series) for series in runs], [max(m.iops for m in series) for series in runs]


def _new_figure(*, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

    figure = Figure(figsize=(8, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None})
    return path
