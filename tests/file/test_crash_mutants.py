"""The judges can fail: each law, broken on purpose in the engine, is found, and by which judge on what."""

import re
from pathlib import Path

import pytest

from tests.crash import alone, between, hostile
from tests.crash.explorer import Violation
from tests.crash.jury import sit
from tests.crash.mutant import FOUND_BY, Mutant

DURABILITY = Path(__file__).parents[2] / "docs" / "durability.md"
LAWS = range(1, 11)
LISTS = {"hostile": hostile.CASES, "alone": alone.CASES, "between": between.CASES}  # judges of one case each


@pytest.mark.sample(15)
@pytest.mark.parametrize("mutant", FOUND_BY, ids=lambda mutant: mutant.__name__)
def test_mutant_is_found(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    with pytest.raises(Violation):
        sit(FOUND_BY[mutant])


@pytest.mark.sample(2)
@pytest.mark.parametrize("line", sorted({line for line in FOUND_BY.values() if line.split()[0] not in LISTS}))
def test_the_workload_that_finds_it_is_sound_without(line: str) -> None:
    assert sit(line) > 10


@pytest.mark.parametrize("line", [f"{judge} {case}" for judge, cases in LISTS.items() for case in cases])
def test_the_case_that_may_find_it_is_sound_without(line: str) -> None:
    assert sit(line) == 1


def test_every_law_is_broken() -> None:
    assert {int(number) for mutant in FOUND_BY for number in re.findall(r"\b\d+\b", laws_of(mutant))} == set(LAWS)


def laws_of(mutant: Mutant) -> str:
    """The laws it breaks, as its docstring begins."""
    return (mutant.__doc__ or "").split(".")[0].split(":")[0]


def test_the_table_in_the_documentation_is_true() -> None:
    rows = re.findall(r"^\| ([a-z0-9_]+) \| ([^|]+) \| `([^`]+)` \|$", DURABILITY.read_text(), re.MULTILINE)
    assert rows == [(mutant.__name__, laws_of(mutant), line) for mutant, line in FOUND_BY.items()]
