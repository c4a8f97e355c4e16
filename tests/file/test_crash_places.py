"""What the extent map does at once, by enumeration: whatever a death leaves of it opens, and holds what it must."""

import pytest

from tests.crash.explorer import Explorer
from tests.crash.images import KINDS
from tests.crash.judge import opener, perform
from tests.crash.workload import random_steps

SERVED = ("accurate", "backing", "encrypted", "encrypted-backing", "encrypted-parts", "parts", "parts-backing")


@pytest.mark.sample(1)
@pytest.mark.parametrize("writethrough", [False, True], ids=["writeback", "writethrough"])
@pytest.mark.parametrize("name", SERVED)
def test_every_sector_is_allowed_after_every_death(name: str, writethrough: bool) -> None:
    kind = KINDS[name]
    steps = random_steps(3, kind.nsectors, kind.cluster_sectors, steps=16)
    run = perform(name, steps, seed=3, writethrough=writethrough, at_once=True)
    assert Explorer(run, opener(name), 3).explore(stride=5) > 100
