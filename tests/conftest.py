"""The tiers, and which of its tests a run takes.

A test is marked pure, file, border or vm by the directory it is in. Guests come first: who has two processors wants the
long tests early. With ``--sample``, which `make test` gives, a test marked ``sample(n)`` runs n of its cases, drawn
by the commit, and of all cases of tests marked ``sample(n, of="name")`` run n; `make deep` runs all of these.
"""

import compileall
import gc
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

TIERS = ("vm", "border", "file", "pure")
SEED = "SAMPLE_SEED"
LOGS = Path("/dev/shm")
SHOWN_BYTES = 64
NAMED_FAILURES = 8
SUMMARY_COLUMNS = 180
RECORDS_OFFSET = 4096  # of a link log; its image's path comes before


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sample", action="store_true", help=f"of long campaigns run the cases that {SEED} draws")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        _compile()
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):  # ignored under nohup, or behind a shell's "&"
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    gc.set_threshold(200_000, 20, 20)  # what Python simulates makes many objects, and few circles: 3 to 5 % of the time
    if config.getoption("--sample"):
        os.environ.setdefault(SEED, _commit())  # workers inherit it


def _compile() -> None:
    """Make the bytecode, which each program that a test starts makes anew where Python is told to write none."""
    for room in ("ring", "virtio", "qcow2", "vhost", "tests"):
        compileall.compile_dir(Path(__file__).parents[1] / room, quiet=2)


@pytest.fixture(autouse=True)
def no_log_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """The images of a test go with its directory; what was killed in it has left logs of them in memory."""
    place = os.fsencode(request.getfixturevalue("tmp_path")) if "tmp_path" in request.fixturenames else b""
    yield
    if place:
        for log in LOGS.glob("qcow2-links[-.]*"):
            with suppress(OSError):
                remove_log(log, place)


def remove_log(log: Path, place: bytes) -> bool:
    """Remove *log* if it is of an image in *place*, or a directory that has some; whether it was."""
    if log.is_dir():  # an empty one may be of a daemon that runs
        is_of_it = sum(remove_log(each, place) for each in log.iterdir()) > 0
        if is_of_it:
            log.rmdir()
        return is_of_it
    with log.open("rb") as file:
        is_of_it = place in file.read(RECORDS_OFFSET)
    if is_of_it:
        log.unlink()
    return is_of_it


def pytest_report_header(config: pytest.Config) -> str | None:
    return f"sample: {SEED}={os.environ[SEED]} draws the same again" if config.getoption("--sample") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        tier = tier_of(item)
        if tier in TIERS:
            item.add_marker(tier)
    items.sort(key=lambda item: TIERS.index(tier_of(item)) if tier_of(item) in TIERS else len(TIERS))
    if config.getoption("--sample"):
        left_out = [item for name, cases in _campaigns(items).items() for item in _undrawn(name, cases)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def tier_of(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).parts[0]


def _campaigns(items: list[pytest.Item]) -> dict[str, list[pytest.Item]]:
    campaigns: dict[str, list[pytest.Item]] = {}
    for item in items:
        if marker := item.get_closest_marker("sample"):
            name = marker.kwargs.get("of", item.nodeid.partition("[")[0])
            campaigns.setdefault(name, []).append(item)
    return campaigns


def _undrawn(name: str, cases: list[pytest.Item]) -> list[pytest.Item]:
    marker = cases[0].get_closest_marker("sample")
    assert marker is not None
    return Random(f"{os.environ[SEED]} {name}").sample(cases, max(0, len(cases) - marker.args[0]))


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    run = subprocess.run(git, capture_output=True, text=True, timeout=30, check=False)
    return run.stdout.strip() or "0"


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """Of long bytes where they first differ: pytest writes thousands of lines in continuous integration."""
    if op != "==" or not isinstance(left, bytes | bytearray) or not isinstance(right, bytes | bytearray):
        return None
    if max(len(left), len(right)) <= SHOWN_BYTES:
        return None
    at = next((at for at, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        return [f"{len(left)} bytes == {len(right)} bytes", "the shorter begins the longer"]
    differ = sum(one != other for one, other in zip(left, right, strict=False))
    ours, theirs = (bytes(each[at : at + SHOWN_BYTES // 2]).hex(" ") for each in (left, right))
    return [
        f"{len(left)} bytes == {len(right)} bytes",
        f"{differ} differ, first at {at:#x}:",
        f"  {ours}",
        f"  {theirs}",
    ]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """At the very end, the names of what failed: of a long log the last lines are what is kept."""
    yield
    failed = [report for kind in ("failed", "error") for report in terminalreporter.stats.get(kind, [])]
    for report in failed[-NAMED_FAILURES:]:
        said = getattr(getattr(report.longrepr, "reprcrash", None), "message", "").partition("\n")[0]
        terminalreporter.write_line(f"{report.outcome}: {report.nodeid}: {said}"[:SUMMARY_COLUMNS])
