"""Law 7 by enumeration: every operation of every action fails, once or for good, on every sort of image.

Of the sequences of two actions here a drawn part, and of their operations every fifteenth; `make faults` visits all.
"""

import random

import pytest

from tests.crash.campaign import CACHES
from tests.crash.life import Host
from tests.crash.sequence import SORTS, Sort, sequences

SEED = 1
PAIRS = 6  # sequences of two actions, a sort and cache mode
STRIDE = 15


@pytest.mark.sample(1)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("sort", SORTS.values(), ids=lambda sort: sort.name)
def test_every_operation_of_every_action_may_fail(sort: Sort, cache: str) -> None:
    host = Host(sort, cache)
    for sequence in sequences(sort, 1):
        host.live_with_every_fault(sequence)
    print(host.outcomes)
    assert len(host.outcomes) == 4  # kinds of ends


@pytest.mark.sample(1)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("sort", SORTS.values(), ids=lambda sort: sort.name)
def test_every_operation_may_fail_in_a_crowd(sort: Sort, cache: str) -> None:
    """Neighbours write into the same clusters, and much completes at once."""
    host = Host(sort, cache, SEED)
    for sequence in sequences(sort, 1):
        host.live_with_every_fault(sequence, stride=3)
    print(host.outcomes)
    assert len(host.outcomes) > 2


@pytest.mark.sample(10)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("sort", SORTS.values(), ids=lambda sort: sort.name)
def test_operations_of_two_actions_may_fail(sort: Sort, cache: str) -> None:
    host = Host(sort, cache)
    draw = random.Random(f"{SEED} {sort.name} {cache}")
    pairs = list(sequences(sort, 2))
    for sequence in draw.sample(pairs, PAIRS if sort.cluster_bits < 16 else 2):
        host.live_with_every_fault(sequence, first=draw.randint(1, STRIDE), stride=STRIDE)
    print(host.outcomes)
    assert host.outcomes.total() > 5
