"""A sample of `make chains`: random chains, long work on them, and the deaths within it."""

import pytest

from qcow2.engine.fetching import Fetcher
from qcow2.engine.links import Links
from tests.chains.trial import Trial
from tests.chains.work import WORK
from tests.crash.explorer import Violation


@pytest.mark.sample(5)
@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("work", WORK)
def test_the_guest_sees_the_same_disk(work: str, part: int) -> None:
    first = 10_000 + 5 * part
    states = [Trial(work, seed, 25, with_qemu=seed == first).run() for seed in range(first, first + 5)]
    assert sum(states) > 30


@pytest.mark.parametrize("seed", [246, 262, 276])
def test_power_loss_after_growing_shows_nothing_from_below(seed: int) -> None:
    """The old end was inside a cluster, whose zeros are a copy: its link waited when the size was stable."""
    assert Trial("resize", seed, 25).run() > 30


@pytest.mark.parametrize(("work", "part", "name"), [("stream", Fetcher, "fetch"), ("rebase", Links, "commit")])
def test_mutants_are_found(monkeypatch: pytest.MonkeyPatch, work: str, part: type, name: str) -> None:
    async def nothing(*arguments: object) -> None:
        """Do not."""

    monkeypatch.setattr(part, name, nothing)
    with pytest.raises(Violation):
        _ = [Trial(work, seed, 40).run() for seed in range(40)]
