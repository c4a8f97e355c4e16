"""Law 7 by enumeration: every operation of every action fails, once or for good, on every sort of image."""

from collections import Counter

import pytest

from tests.crash.campaign import CACHES
from tests.crash.life import live_with_every_fault
from tests.crash.sequence import SORTS, Sort, sequences

outcomes: Counter[str] = Counter()


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("sort", SORTS.values(), ids=lambda sort: sort.name)
def test_every_operation_of_every_action_may_fail(sort: Sort, cache: str) -> None:
    for sequence in sequences(sort, 1):
        outcomes.update(live_with_every_fault(sort, cache, sequence))


def test_enough_faults_were_injected(capsys: pytest.CaptureFixture[str]) -> None:
    """After the test above; alone it has nothing to count."""
    if not outcomes:
        pytest.skip("the faults are counted when the whole file runs")
    with capsys.disabled():
        print(f"\nfaults: {outcomes.total()} injected; {dict(outcomes.most_common())}")
    assert len(outcomes) == 4
