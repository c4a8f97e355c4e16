"""The judge can fail: each law, broken on purpose in the engine, is found by the explorer, and by which workload."""

import re
from pathlib import Path

import pytest

from tests.crash.campaign import explore, parse, scene_of
from tests.crash.explorer import Violation
from tests.crash.mutant import FOUND_BY, Mutant

DURABILITY = Path(__file__).parents[2] / "docs" / "durability.md"


@pytest.mark.parametrize("mutant", FOUND_BY, ids=lambda mutant: mutant.__name__)
def test_mutant_is_found(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    workload, _ = parse(FOUND_BY[mutant])
    scene = scene_of(workload, None)
    mutant(monkeypatch)
    with pytest.raises(Violation):
        explore(workload, scene)


@pytest.mark.parametrize("line", sorted(set(FOUND_BY.values())))
def test_the_workload_that_finds_it_is_sound_without(line: str) -> None:
    workload, _ = parse(line)
    scene = scene_of(workload, None)
    explore(workload, scene)
    assert scene.count.states > 10


def test_the_table_in_the_documentation_is_true() -> None:
    rows = re.findall(r"^\| ([a-z_]+) \| ([^|]+) \| `([^`]+)` \|$", DURABILITY.read_text(), re.MULTILINE)
    laws = {mutant.__name__: (mutant.__doc__ or "").split(".")[0].split(":")[0] for mutant in FOUND_BY}
    assert rows == [(mutant.__name__, laws[mutant.__name__], line) for mutant, line in FOUND_BY.items()]
