"""Whoever changes the C sees here which mutants of the simulator have to follow."""

import re
from pathlib import Path

import pytest

from tests.sim.build import ROOT, put
from tests.sim.hunt import DURABILITY, TABLE, fault_of
from tests.sim.mutant import MUTANTS, Mutant
from tests.sim.patch import PATCHES


@pytest.mark.parametrize("mutant", [one for one in MUTANTS if one.edit], ids=lambda mutant: mutant.name)
def test_a_mutant_finds_what_it_breaks(mutant: Mutant) -> None:
    assert mutant.edit
    assert (ROOT / mutant.edit.file).read_text().count(mutant.edit.old) == 1
    assert mutant.edit.new != mutant.edit.old


def test_a_mutant_without_an_edit_is_a_patch_of_the_engine() -> None:
    assert {one.name for one in MUTANTS if not one.edit} == {patch.__name__ for patch in PATCHES}


def test_the_table_in_the_documentation_is_of_these_mutants_and_workloads() -> None:
    rows = re.findall(
        r"^\| (\w+) \| ([^|]+) \| ([^|]+) \| \d+ \| ", TABLE.findall(DURABILITY.read_text())[0], re.MULTILINE
    )
    assert rows == [(one.name, one.law, one.workload) for one in MUTANTS]


def test_what_was_wrong_is_said_without_what_differs() -> None:
    stdout = "history 7\nseed 7: v2-backing, writethrough=False: read 9: sector 81 shows b'R00'\nTally(histories=8)\n"
    assert fault_of(stdout, "") == "read N: sector N shows ..."
    assert fault_of("history 7\n", "/tmp/include/ring/x.c:3: not so: a == 1 || b\n") == (
        r"assertion in ring/x.c: `a == 1 \|\| b`"
    )


def test_who_falls_over_has_found_nothing() -> None:
    began = "history 7\nseed 7: overlay, writethrough=True: "
    stumbled = (
        f"{began}Traceback (most recent call last):\n  File x\nAttributeError: no such thing\n\nTally(histories=8)\n"
    )
    assert fault_of(stumbled, "") is None
    assert fault_of("", "Traceback (most recent call last):\nCalledProcessError: gcc\n") is None  # it was not built
    assert fault_of("history 7\n", "") is None  # a death by a signal
    assert fault_of(f"{began}100000 calls in one life: it spins\nTally(histories=8)\n", "") is not None


def test_a_compiler_reads_its_header_whole_while_another_run_writes_the_same(tmp_path: Path) -> None:
    header = tmp_path / "of.h"
    header.write_text("of the first run")
    with header.open() as reading:
        put(header, "of the second run")
        assert (reading.read(), header.read_text()) == ("of the first run", "of the second run")
