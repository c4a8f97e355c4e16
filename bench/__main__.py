"""`python -m bench`: compare, print, store."""

import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from bench.case import Case, UnknownCase, select
from bench.ceiling import measure_ceilings
from bench.comparison import Arena, Comparison
from bench.ending import end_on_sigterm, ignore_signals
from bench.featurerows import FEATURES
from bench.goal import needed
from bench.load import LoadFailure
from bench.machine import command_line, describe
from bench.option import Options, parse
from bench.plot import NoPlots, draw
from bench.report import Run, markdown, ratio_of, write_tables
from bench.rows import EXTRAS, ROWS
from bench.server import ServerFailure
from bench.sweep import SCALE, SWEEPS
from bench.watch import stopwatch

IDLE_SECONDS = 20.0


def main() -> int:
    """Run the benchmark; 0 if every case ran, whatever the figures."""
    options = parse()
    end_on_sigterm()
    try:
        cases = chosen(options.patterns)
        cases = cases[options.part.of(len(cases))]
        if options.list_cases:
            return list_cases(cases)
        run = execute(cases, options)
    except (UnknownCase, ServerFailure, LoadFailure, OSError, subprocess.CalledProcessError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(markdown(run))
    try:
        draw(run.comparisons, SWEEPS, options.output)
    except NoPlots as missing:
        print(f"bench: {missing}", file=sys.stderr)
    return 0 if len(run.comparisons) == len(cases) else 1


def chosen(patterns: list[str]) -> list[Case]:
    """The cases meant by the words of the command line; a sweep's name means its points, "goals" what has a target."""
    singles = (*ROWS, *EXTRAS, *FEATURES)
    points = tuple(case for sweep in SWEEPS for _, case in sweep.points)
    if patterns == ["all"]:
        return [*singles, *points]
    names = {sweep.name: [case.name for _, case in sweep.points] for sweep in SWEEPS}
    names["scale"] = [name for sweep in SCALE for name in names[sweep]]
    names["goals"] = [case.name for case in (*singles, *points) if case.target is not None or case.name in needed()]
    expanded = [name for pattern in patterns for name in names.get(pattern, [pattern])]
    return select(expanded, (*singles, *points)) if patterns else list(singles)


def list_cases(cases: list[Case]) -> int:
    for case in cases:
        print(f"{case.name:26} {case.title}")
    return 0


def execute(cases: list[Case], options: Options) -> Run:
    """Measure *cases* in directories of their own, which are gone afterwards."""
    with ExitStack() as stack:
        options.directory.mkdir(parents=True, exist_ok=True)
        disk = stack.enter_context(tempfile.TemporaryDirectory(dir=options.directory, prefix="bench-"))
        tmpfs = stack.enter_context(tempfile.TemporaryDirectory(dir=options.tmpfs, prefix="bench-"))
        stack.callback(ignore_signals)  # first of all
        machine = describe(Path(disk), options.opponent)
        say = stopwatch()
        ceilings = {}
        if options.ceiling and (wanted := {case.limit for case in cases if case.limit}):
            say("the disk alone, IOPS")
            ceilings = measure_ceilings(wanted, Path(disk).resolve(), seconds=options.seconds, say=say)
        where = Path(disk).resolve(), Path(tmpfs)
        arena = Arena(*where, pairs=options.pairs, seconds=options.seconds, opponent=options.opponent)
        run = Run(machine, command_line(), options.pairs, options.seconds, ceilings, (), {})
        for number, case in enumerate(cases, 1):
            say(f"{number}/{len(cases)} {case.name}: {case.title}")
            try:
                comparison = arena.compare(case, say)
            except (ServerFailure, LoadFailure) as failure:  # a run is long: the others are measured
                say(f"  bench: {failure}")
                continue
            run = replace(run, comparisons=(*run.comparisons, comparison))
            write_tables(run, options.output)  # a run is long: what is known survives its end
            say(summary(comparison))
        if options.patterns in ([], ["all"]):
            say(f"idle for {IDLE_SECONDS:g} s each")
            run = replace(run, idle=arena.watch_idle(IDLE_SECONDS))
            write_tables(run, options.output)
        return run


def summary(comparison: Comparison) -> str:
    ratio, target = ratio_of(comparison), comparison.case.target
    aim = "" if target is None else f", at least {target:g} wanted"
    return f"  {ratio} x QEMU{aim}: {ratio.verdict(target)}"


if __name__ == "__main__":
    sys.exit(main())
