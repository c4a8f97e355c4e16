"""`python -m bench.stored DIRECTORY...`: runs that were stored, read again and joined; what README quotes of them.

A long run may be made in parts, each with `--output` of its own. Of a case that was measured twice, more pairs count.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.case import Case, UnknownCase, select
from bench.comparison import Comparison
from bench.featurerows import FEATURES
from bench.machine import Machine
from bench.measurement import Measurement
from bench.plot import NoPlots, draw
from bench.report import FORMAT, Run, figure, median_of, ratio_of, row, write_tables
from bench.rows import EXTRAS, ROWS
from bench.server import Aio
from bench.sweep import SWEEPS

CASES = (*ROWS, *EXTRAS, *FEATURES, *(case for sweep in SWEEPS for _, case in sweep.points))


class Unlike(Exception):
    """Runs that do not belong together, or of another form."""


def main() -> int:
    """Join, store if asked to, quote; 0 if all could be read."""
    parser = argparse.ArgumentParser(prog="python -m bench.stored", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("directories", metavar="DIRECTORY", nargs="+", type=Path, help="--output of a run")
    add("--output", type=Path, help="write results.json, table.md and plots of all of them here")
    add("--quote", metavar="CASE", nargs="*", default=[case.name for case in ROWS], help="default: the first rows")
    options = parser.parse_args()
    try:
        run = joined([read(directory / "results.json") for directory in options.directories])
        quoted = select(options.quote, CASES)
        if options.output:
            write_tables(run, options.output)
    except (Unlike, UnknownCase, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print("\n".join(quotation(run, quoted)))
    try:
        if options.output:
            draw(run.comparisons, SWEEPS, options.output)
    except NoPlots as missing:
        print(f"bench: {missing}", file=sys.stderr)
    return 0


def read(path: Path) -> Run:
    """The run stored in *path*. Raises: Unlike."""
    stored = json.loads(path.read_text())
    if stored["format"] != FORMAT:
        raise Unlike(f"{path} has format {stored['format']}, not {FORMAT}")
    known = {case.name: case for case in CASES}
    if unknown := [case["name"] for case in stored["cases"] if case["name"] not in known]:
        raise Unlike(f"{path}: there is no case {', '.join(unknown)} any more")
    comparisons = tuple(_comparison(known[case["name"]], case) for case in stored["cases"])
    machine = Machine(**stored["machine"])
    return Run(
        machine, stored["command"], stored["pairs"], stored["seconds"], stored["ceilings"], comparisons, stored["idle"]
    )


def _comparison(case: Case, stored: dict[str, Any]) -> Comparison:
    ours, theirs = (tuple(Measurement(**run) for run in stored[server]) for server in ("ours", "qemu"))
    traced = stored["qemu_traced"]
    return Comparison(
        case, Aio(stored["aio"]), stored["aio_trials"], ours, theirs, Measurement(**traced) if traced else None
    )


def joined(runs: Sequence[Run]) -> Run:
    """All *runs* as one, of one commit and one opponent. Of the disk alone, the best figure. Raises: Unlike."""
    first = runs[0]
    for run in runs[1:]:
        for what in ("commit", "versions", "processor"):
            ours, other = getattr(first.machine, what), getattr(run.machine, what)
            if ours != other:
                raise Unlike(f"runs of more than one {what}: {ours} and {other}")
    measured = [comparison for run in runs for comparison in run.comparisons]
    found = {comparison.case.name: comparison for comparison in sorted(measured, key=lambda each: len(each.ours))}
    return replace(
        first,
        machine=replace(first.machine, load_average=max(run.machine.load_average for run in runs)),
        command="; ".join(run.command for run in runs),
        ceilings={name: max(_ceilings(runs, name)) for run in runs for name in run.ceilings},
        comparisons=tuple(found[case.name] for case in CASES if case.name in found),
        idle={server: share for run in runs for server, share in run.idle.items()},
    )


def _ceilings(runs: Sequence[Run], name: str) -> list[float]:
    return [run.ceilings[name] for run in runs if name in run.ceilings]


def quotation(run: Run, cases: Sequence[Case]) -> Iterator[str]:
    """The table of *cases* for README and docs/speed.md, as far as they were measured."""
    found = {comparison.case.name: comparison for comparison in run.comparisons}
    qemu = run.machine.versions["qemu"].removeprefix("qemu-storage-daemon version ").split()[0]
    yield f"| case | ours, IOPS | QEMU {qemu}, IOPS | ratio | wanted | the disk alone |"
    yield "|---|--:|--:|--:|--:|--:|"
    for case in cases:
        if case.name not in found:
            continue
        comparison = found[case.name]
        ours, theirs = (median_of(runs, "iops") for runs in (comparison.ours, comparison.theirs))
        doubt = " (noise)" if "noise" in ratio_of(comparison).verdict(case.target) else ""
        yield row(
            [
                case.title,
                figure(ours),
                f"{figure(theirs)} ({comparison.aio.value})",
                f"{ratio_of(comparison)}{doubt}",
                "" if case.target is None else f"{case.target:g}",
                figure(run.ceilings.get(case.limit)) if case.limit else "",
            ]
        )


if __name__ == "__main__":
    sys.exit(main())
