"""The laws of each feature, broken on purpose, are found: subclusters, data files, snapshots."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from qcow2.engine.links import Links
from qcow2.engine.snapshots import Snapshots
from qcow2.engine.stability import Stability
from qcow2.engine.zeroing import Zeroer
from tests.crash.explorer import Violation
from tests.crash.features import explore_data_file
from tests.crash.images import KINDS
from tests.crash.judge import opener, perform
from tests.crash.recovering import RecoveringExplorer
from tests.crash.workload import random_steps
from tests.file import test_crash_snapshots
from tests.file.test_crash_data_file import RAW, TOLD

Patch = pytest.MonkeyPatch


def parts_are_named_at_once(patch: Patch) -> None:
    """Laws 2 and 3: a subcluster is data before its bytes are stable."""

    async def link(self: Links, guest_offset: int, old: Any, entries: Sequence[int], freed: Sequence[int]) -> None:
        await self._mapping.link(guest_offset, entries)
        await self._reaper.free(freed)

    patch.setattr(Links, "link", link)


def data_file_is_not_synced(patch: Patch) -> None:
    """Law 2: a flush makes the image stable, and its data not."""
    init = Stability.__init__

    def alone(self: Stability, file: Any, statistics: Any, on_failure: Any, data_file: Any = None) -> None:
        init(self, file, statistics, on_failure)

    patch.setattr(Stability, "__init__", alone)


def raw_data_file_keeps_what_was_zeroed(patch: Patch) -> None:
    """Law 3: the raw file is another disk than the image."""
    init = Zeroer.__init__

    def not_raw(self: Zeroer, *arguments: Any, **named: Any) -> None:
        init(self, *arguments, **named)
        self._is_raw = False

    patch.setattr(Zeroer, "__init__", not_raw)


def shared_clusters_keep_their_flags(patch: Patch) -> None:
    """Law 3: the disk is written in place where a snapshot shows it."""

    async def nothing(self: Snapshots, *arguments: Any, **named: Any) -> None:
        """No flag is cleared."""

    patch.setattr(Snapshots, "_share", nothing)


def some_parts(seed: int) -> int:
    """A short workload on subclusters over a backing file."""
    kind = KINDS["parts-backing"]
    steps = random_steps(seed, kind.nsectors, kind.cluster_sectors, steps=5, depth=2)
    run = perform(kind.name, steps, seed=seed, writethrough=False)
    return RecoveringExplorer(run, opener(kind.name), seed).explore(stride=2)


def a_data_file(seed: int) -> int:
    return explore_data_file(seed, TOLD)


def a_raw_data_file(seed: int) -> int:
    return explore_data_file(seed, RAW)


def a_snapshot(seed: int) -> int:
    return test_crash_snapshots.explore("small", "create and delete", seed=seed, stride=9)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("explored", "mutant"),
    [
        (some_parts, parts_are_named_at_once),
        (a_data_file, data_file_is_not_synced),
        (a_raw_data_file, raw_data_file_keeps_what_was_zeroed),
        (a_snapshot, shared_clusters_keep_their_flags),
    ],
    ids=lambda each: each.__name__,
)
def test_mutant_is_found(explored: Callable[[int], int], mutant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutant(monkeypatch)
    with pytest.raises(Violation):
        sum(explored(seed) for seed in range(3, 8))
