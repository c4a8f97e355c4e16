"""Laws 1 to 8 by enumeration: every action on every sort of image dies at every moment, in every way; so does recovery.

Here sequences of one action, a drawn part of those of two, and random workloads; `make crash` visits all up to three.
A failure prints a line that `python -m tests.crash replay LINE` visits again.
"""

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from tests.crash.campaign import CACHES, Workload, explore, parse, replay, run_workload, scene_of, sequences_of
from tests.crash.explorer import Violation
from tests.crash.mutant import newest_record_counts_whatever_the_mark_says, repair_begins_without_a_sync
from tests.crash.sequence import ACTIONS, SORTS, Sort, beginning
from tests.crash.walk import Count

SEED = 1
PAIRS = 4  # sequences of two actions, a sort and cache mode


def enough(count: Count) -> bool:
    """Whether the walk was one: states at most moments, of which QEMU has seen some."""
    return count.states > 2 * count.moments > 100 and count.outside >= count.states // 400


def workloads(sort: Sort, cache: str) -> Iterator[tuple[Workload, bool]]:
    """What is run, and whether all but its last action has been before."""
    for workload in sequences_of(sort, cache, SEED, 1):
        yield workload, False
    pairs = list(sequences_of(sort, cache, SEED, 2))
    random.Random(f"{sort.name} {cache}").shuffle(pairs)
    for workload in islice(pairs, PAIRS if sort.cluster_bits < 16 else 1):
        yield workload, True


@pytest.mark.sample(1)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("sort", SORTS.values(), ids=lambda sort: sort.name)
def test_every_death_leaves_what_the_laws_allow(sort: Sort, cache: str, tmp_path: Path) -> None:
    scenes = {}
    for workload, only_last in workloads(sort, cache):
        scene = scenes.setdefault(workload.full, scene_of(workload, tmp_path))
        explore(workload, scene, only_last=only_last)
    visited = Count()
    for scene in scenes.values():
        visited.add(scene.count)
    print(visited)
    assert enough(visited)


@pytest.mark.sample(1)
@pytest.mark.parametrize("what", ["random-20x8", "burst-20x8"])
@pytest.mark.parametrize("name", ["512", "512-lazy", "backing-lazy"])
def test_every_death_under_many_requests_in_flight(name: str, what: str, tmp_path: Path) -> None:
    workload = Workload(SORTS[name], "writeback", SEED, what)
    scene = scene_of(workload, tmp_path)
    explore(workload, scene)
    print(scene.count)
    assert enough(scene.count)


def test_each_action_makes_sense_somewhere() -> None:
    for action in ACTIONS:
        assert any(sort.has(action) for sort in SORTS.values())


def test_a_shorter_sequence_is_the_beginning_of_a_longer_one() -> None:
    """That is why the moments before the last action need not be visited again."""
    sort = SORTS["backing-lazy"]
    short, _ = run_workload(Workload(sort, "writeback", SEED, "copy+discard"))
    longer, last = run_workload(Workload(sort, "writeback", SEED, "copy+discard+allocate"))
    assert list(map(type, short.journal[:last])) == list(map(type, longer.journal[:last]))
    assert last > 20


@pytest.mark.parametrize("full", ["block", "table"])
def test_actions_that_grow_the_refcounts_do(full: str) -> None:
    sort = SORTS["width-64"]
    action = "block" if full == "block" else "table-growth"
    run, _ = run_workload(Workload(sort, "writethrough", SEED, action))
    before, after = beginning(sort, full).image.read(48, 12), run.file.read(48, 12)
    assert (before != after) == (full == "table")
    table, where = int.from_bytes(after[:8], "big"), sort.per_table if full == "table" else 1
    assert any(run.file.read(table + 8 * where, 8))


def test_a_printed_line_replays_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a flush that does nothing: the state is found, and found again by its line; with a flush it is sound."""
    workload = Workload(SORTS["512"], "writeback", SEED, "overwrite+flush")

    async def nothing(*arguments: object) -> None:
        return None

    with monkeypatch.context() as patch:
        patch.setattr("qcow2.engine.image.Image.flush", nothing)
        with pytest.raises(Violation) as found:
            explore(workload, scene_of(workload, None))
        line = str(found.value).splitlines()[0]
        assert parse(line)[0] == workload
        with pytest.raises(Violation) as again:
            replay(line)
        assert str(again.value) == str(found.value)
    replay(line)


def test_a_copy_that_is_put_back_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line names the moment of the copy; the disk is wrong only while the log is believed whatever it continues."""
    workload = Workload(SORTS["backing"], "writeback", SEED, "copy+discard")
    with monkeypatch.context() as patch:
        newest_record_counts_whatever_the_mark_says(patch)
        with pytest.raises(Violation, match="restored") as found:
            explore(workload, scene_of(workload, None))
        with pytest.raises(Violation) as again:
            replay(str(found.value))
        assert str(again.value) == str(found.value)
    replay(str(found.value))


def test_a_death_within_a_recovery_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of a state that a power loss left in a repair names the kill before it, too."""
    workload = Workload(SORTS["512"], "writeback", SEED, "random-80x2")
    with monkeypatch.context() as patch:
        repair_begins_without_a_sync(patch)
        with pytest.raises(Violation, match=r",kill,[0-9-]+/(leaks|all)/\d+,power,") as found:
            explore(workload, scene_of(workload, None))
        with pytest.raises(Violation) as again:
            replay(str(found.value))
        assert str(again.value) == str(found.value)
    replay(str(found.value))
