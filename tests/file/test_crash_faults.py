"""Law 7 by enumeration: every operation of every action fails, once or for good, on every sort of image.

Of the sequences of two actions here a drawn part, and of their operations every fifteenth; `make faults` visits all.
"""

import random
from collections import Counter

import pytest

from tests.crash.campaign import CACHES
from tests.crash.life import Host
from tests.crash.sequence import SORTS, Sort, sequences

SEED = 1
PAIRS = 6  # sequences of two actions, a sort and cache mode
STRIDE = 15
outcomes: Counter[str] = Counter()


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("sort", SORTS.values(), ids=lambda sort: sort.name)
def test_every_operation_of_every_action_may_fail(sort: Sort, cache: str) -> None:
    host = Host(sort, cache)
    for sequence in sequences(sort, 1):
        host.live_with_every_fault(sequence)
    outcomes.update(host.outcomes)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("sort", SORTS.values(), ids=lambda sort: sort.name)
def test_operations_of_two_actions_may_fail(sort: Sort, cache: str) -> None:
    host = Host(sort, cache)
    draw = random.Random(f"{SEED} {sort.name} {cache}")
    pairs = list(sequences(sort, 2))
    for sequence in draw.sample(pairs, PAIRS if sort.cluster_bits < 16 else 2):
        host.live_with_every_fault(sequence, first=draw.randint(1, STRIDE), stride=STRIDE)
    outcomes.update(host.outcomes)


def test_enough_faults_were_injected(capsys: pytest.CaptureFixture[str]) -> None:
    """After the tests above; alone it has nothing to count."""
    if not outcomes:
        pytest.skip("the faults are counted when the whole file runs")
    with capsys.disabled():
        print(f"\nfaults: {outcomes.total()} injected; {dict(outcomes.most_common())}")
    assert len(outcomes) == 4
