"""Law 1 on the real thing: daemons killed while they open, serve and close; `make kill` kills hundreds.

A failure names its kind, cache mode and seed; `python -m tests.kill --kind ... --cache ... --seed ...` repeats it.
"""

from pathlib import Path

import pytest

from tests.kill.campaign import CACHES
from tests.kill.images import KINDS
from tests.kill.round import Round


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_killed_daemon_acknowledged_is_there(tmp_path: Path, kind: str, cache: str) -> None:
    killed = Round(tmp_path, kind, cache, seed=7, kills=2)
    killed.run()
    assert killed.tally.kills >= 2
    assert killed.tally.acknowledged
