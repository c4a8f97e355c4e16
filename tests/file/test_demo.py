"""The demo: what it prints for given figures, that its race runs, and that a killed one leaves nothing."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench.measurement import Measurement
from tests.patience import TIMEOUT

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from race import OURS, THEIRS, Race, Run, bars, conclusion, drawn, run_race, table  # noqa: E402

ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}"}
RACE = """
import sys
from pathlib import Path
from demo import stopwatch, workplace
from race import print_race, run_race
with workplace(Path(sys.argv[1], "demo")) as directory:
    race = run_race(directory, stopwatch(), seconds=float(sys.argv[2]))
print_race(race, Path(sys.argv[1], "demo.svg"))
"""


def race_of(ours: float, theirs: float | None) -> Race:
    figures = Measurement("", 10, 1, ours, 900, 2100, 0, 0, 0, 0, 62.5, None, None, 0, 0, 0, 0)
    if theirs is None:
        return Race(Run(OURS, figures, 62.5), None, "it is not there")
    return Race(Run(OURS, figures, 62.5), Run(THEIRS, replace(figures, iops=theirs), 990))


def test_table_has_a_row_for_each_server() -> None:
    head, *rows = table(race_of(20_000, 4_000))
    assert head.split() == ["writes", "a", "second", "median", "99", "of", "100", "fdatasyncs", "a", "write"]
    assert [row.split() for row in rows] == [
        [OURS, "20,000", "0.90", "ms", "2.10", "ms", "0.06"],
        [THEIRS, "4,000", "0.90", "ms", "2.10", "ms", "0.99"],
    ]


def test_bars_are_as_long_as_servers_are_fast() -> None:
    ours, theirs = (line.count("█") for line in bars(race_of(20_000, 5_000)))
    assert ours == 4 * theirs


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (20_000, 4_000, "5.0 times QEMU's"),
        (4_400, 4_000, "no difference"),
        (3_800, 4_000, "no difference"),
        (4_000, 8_000, "QEMU's daemon is 2.0 times as fast"),
        (4_000, None, "nothing to compare with"),
    ],
)
def test_conclusion_is_one_sentence_that_fits_the_figures(ours: float, theirs: float | None, expected: str) -> None:
    sentence = conclusion(race_of(ours, theirs))
    assert expected in sentence
    assert sentence.endswith(".")
    assert ". " not in sentence


@pytest.mark.parametrize("theirs", [4_000, None])
def test_picture_is_svg_with_a_bar_for_each_server(theirs: float | None) -> None:
    picture = ElementTree.fromstring(drawn(race_of(20_000, theirs)))
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(picture.findall("{*}rect")) == (1 if theirs is None else 2)


def test_race_counts_both_servers_and_leaves_no_image(tmp_path: Path) -> None:
    race = run_race(tmp_path, lambda line: None, seconds=0.3)
    assert race.theirs is not None, race.absence
    for run in race.runs:
        assert run.measured.iops > 0
        assert run.syncs
    assert list(tmp_path.iterdir()) == []


def test_without_qemu_storage_daemon_ours_is_shown_and_the_lack_is_one_line(tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("qemu-img", "setpriv"):
        (programs / name).symlink_to(Path("/usr/bin", name))
    command = [sys.executable, "-c", RACE, tmp_path, "0.3"]
    environment = {**ENVIRONMENT, "PATH": str(programs)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert sum(THEIRS in line for line in lines) == 1
    assert any(line.startswith(f"{OURS} ") and "█" in line for line in lines)


def processes_on(directory: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended meanwhile
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in found if str(directory) in line]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_demo_that_is_told_to_end_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    with started(tmp_path, seconds=300) as run:
        run.send_signal(number)
        run.communicate(timeout=TIMEOUT)
    assert run.returncode != 0
    assert list(tmp_path.iterdir()) == []
    assert processes_on(tmp_path) == []


def test_what_a_killed_demo_leaves_is_removed_by_the_next(tmp_path: Path) -> None:
    with started(tmp_path, seconds=300) as run:
        run.kill()
    assert os.listdir(tmp_path / "demo") == ["race.qcow2"]
    with started(tmp_path, seconds=0.3) as run:
        run.communicate(timeout=TIMEOUT)
    assert os.listdir(tmp_path) == ["demo.svg"]


def test_a_second_demo_leaves_the_first_alone(tmp_path: Path) -> None:
    with started(tmp_path, seconds=300) as first:
        with started(tmp_path, seconds=0.3) as second:
            _, said = second.communicate(timeout=TIMEOUT)
        assert "another demo is at work" in said
        assert os.listdir(tmp_path / "demo") == ["race.qcow2"]
        first.terminate()
        first.communicate(timeout=TIMEOUT)


@contextmanager
def started(directory: Path, *, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """A race in *directory* whose first image is there, or a demo that has ended."""
    command = [sys.executable, "-u", "-c", RACE, str(directory), str(seconds)]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    ) as run:
        assert run.stdout is not None
        run.stdout.readline()
        while not (directory / "demo/race.qcow2").exists() and run.poll() is None:
            os.sched_yield()
        yield run
