"""Laws 2, 3, 4, 6 and 8 by enumeration: whatever a kill or a power loss leaves opens clean and holds what it must.

A failing state is named by its kind, seed, crash point and the operations that reached the disk: run the test again.
"""

import pytest

from tests.crash import recovering
from tests.crash.explorer import Explorer, Violation
from tests.crash.images import KINDS
from tests.crash.judge import opener, perform
from tests.crash.mutant import repair_begins_without_a_sync
from tests.crash.recovering import RecoveringExplorer
from tests.crash.workload import Action, random_steps

SMALL = [name for name, kind in KINDS.items() if kind.cluster_bits == 9]
RARE = ("encrypted-lazy", "encrypted-parts", "encrypted-v2")  # left to the campaign
LARGE = [name for name in KINDS if name not in SMALL and name not in RARE]


def explore(name: str, seed: int, *, writethrough: bool, stride: int) -> int:
    kind = KINDS[name]
    steps = random_steps(seed, kind.nsectors, kind.cluster_sectors)
    run = perform(name, steps, seed=seed, writethrough=writethrough)
    return RecoveringExplorer(run, opener(name), seed).explore(stride=stride)


@pytest.mark.sample(1)
@pytest.mark.parametrize("writethrough", [False, True], ids=["writeback", "writethrough"])
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("seed", [0, 2])
def test_every_point_of_a_random_workload_on_small_clusters(name: str, seed: int, writethrough: bool) -> None:
    assert explore(name, seed, writethrough=writethrough, stride=1) > 100


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", LARGE)
def test_points_of_a_random_workload_on_large_clusters(name: str) -> None:
    assert explore(name, 1, writethrough=False, stride=5) > 100


def test_reopening_in_the_middle_changes_no_promise() -> None:
    kind = KINDS["small-lazy"]
    steps = random_steps(5, kind.nsectors, kind.cluster_sectors, steps=4)
    steps += [[Action("reopen")], *random_steps(6, kind.nsectors, kind.cluster_sectors, steps=4)]
    run = perform("small-lazy", steps, seed=5, writethrough=False)
    assert Explorer(run, opener("small-lazy"), 5).explore() > 100


def test_what_a_killed_process_has_discarded_may_come_back_in_a_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found if each kill is looked at: counts must not fall before that is stable."""
    monkeypatch.setattr(recovering, "RECOVERED", 1)
    run = perform("small", [[Action("discard", 1, 5)], [Action("flush")]], seed=0, writethrough=False)
    assert RecoveringExplorer(run, opener("small")).explore() > 300
    repair_begins_without_a_sync(monkeypatch)
    with pytest.raises(Violation, match="/leaks point="):
        RecoveringExplorer(run, opener("small")).explore()
