"""`python -m tests.sim.hunt`: every mutant must be found; by which workload, when, and how it shows.

With --write the table in docs/durability.md says so.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tests.sim.build import ROOT
from tests.sim.mutant import BY_NAME, MUTANTS, Mutant

DURABILITY = ROOT / "docs" / "durability.md"
HEAD = "| mutant | breaks | workload | histories | shows as |\n|---|---|---|---|---|\n"
TABLE = re.compile(re.escape(HEAD) + r"(?:\|.*\n)*")
PATIENCE = 3600  # seconds
SOUND = (("--histories", "32"), ("--histories", "16", "--filled"))  # without a mutant
SHOWN = 90  # characters of what is said
TOLD = 2000  # of what an end without a find says


class Found(NamedTuple):
    """How a mutant came to light."""

    histories: int
    fault: str


class FellOver(Exception):
    """What ran the mutant came to its end, and no judge had spoken: nothing is found."""


def hunt(mutant: Mutant, histories: int) -> Found | None:
    """Run up to so many *histories* in a process of their own. None: none shows it. Raises: FellOver."""
    command = [sys.executable, "-m", "tests.sim", "--mutant", mutant.name, "--histories", str(histories)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired as error:
        raise FellOver(f"it does not end within {PATIENCE} s") from error
    if not done.returncode:
        return None
    fault = fault_of(done.stdout, done.stderr)
    if fault is None:
        raise FellOver(f"exit {done.returncode}: {(done.stdout + done.stderr).strip()[-TOLD:]}")
    return Found(len(re.findall("^history ", done.stdout, re.MULTILINE)), fault)


def require_sound() -> None:
    """Raises: CalledProcessError if histories without a mutant fail, too: then nothing is a find."""
    for options in SOUND:
        subprocess.run([sys.executable, "-m", "tests.sim", *options], cwd=ROOT, check=True)


def fault_of(stdout: str, stderr: str) -> str | None:
    """What a judge, or an assertion of C, says is wrong, without what differs from history to history.

    None: neither did. An exception that nobody expected or a death by a signal is no find: it may be of the mutant's
    own making, or of the simulator's.
    """
    if said := re.search(r"^(\S+?):\d+: not so: (.*)$", stderr, re.MULTILINE):
        file = re.sub(".*/include/", "", said[1])
        return f"assertion in {file}: `{said[2].replace('|', chr(92) + '|')}`"
    said = re.search(r"^seed \d+: \S+, writethrough=\w+: (.*)$", stdout, re.MULTILINE)
    if said is None or said[1].startswith("Traceback"):
        return None
    text = re.sub(r"sim/.*?,(kill|power|restored)[^:]*: ", r"\1: ", said[1])
    text = re.sub(r"\[.*|b['\"].*", "...", text)
    return re.sub(r"0x[0-9a-f]+|\d+", "N", text).replace("|", "\\|")[:SHOWN]


def row(mutant: Mutant, found: Found) -> str:
    return f"| {mutant.name} | {mutant.law} | {mutant.workload} | {found.histories} | {found.fault} |\n"


def told(mutant: Mutant, histories: int) -> str:
    """The row of *mutant*, printed as soon as it is known; empty if nothing shows it."""
    try:
        found = hunt(mutant, histories)
    except FellOver as error:
        print(f"{mutant.name} fell over, which is no find: {error}", flush=True)
        return ""
    line = row(mutant, found) if found else ""
    print(line or f"{mutant.name} is not found\n", end="", flush=True)
    return line


def write(rows: dict[str, str]) -> None:
    """Put the *rows* of these mutants into the table, which has those of others."""
    text = DURABILITY.read_text()
    (table,) = TABLE.findall(text)
    known = {line.split(" | ")[0].removeprefix("| "): f"{line}\n" for line in table.splitlines()[2:]} | rows
    lines = [known[mutant.name] for mutant in MUTANTS if mutant.name in known]
    DURABILITY.write_text(text.replace(table, HEAD + "".join(lines)))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.hunt")
    parser.add_argument("names", nargs="*", metavar="MUTANT", help="all without it")
    parser.add_argument("--histories", type=int, default=600, help="at most, of each")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--write", action="store_true", help=f"into the table of {DURABILITY.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    mutants = [BY_NAME[name] for name in options.names] or MUTANTS
    require_sound()
    with ThreadPoolExecutor(options.jobs) as pool:
        lines = pool.map(lambda mutant: told(mutant, options.histories), mutants)
        rows = {mutant.name: line for mutant, line in zip(mutants, lines, strict=True) if line}
    print(f"{len(rows)} of {len(mutants)} found")
    if options.write:
        write(rows)
    return len(rows) < len(mutants)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
