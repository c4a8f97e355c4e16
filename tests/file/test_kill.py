"""Law 1 on the real thing: daemons killed while they open, serve and close; `make kill` kills hundreds.

A failure names its kind, cache mode and seed; `python -m tests.kill --kind ... --cache ... --seed ...` repeats it.
"""

from pathlib import Path

import pytest

from tests.kill.campaign import CACHES, DIRECT
from tests.kill.features import FEATURES
from tests.kill.images import KINDS
from tests.kill.round import Round
from tests.kill.throttle import NoThrottle, throttle


@pytest.mark.sample(4)
@pytest.mark.parametrize("cache", [cache for cache in CACHES if cache not in DIRECT])
@pytest.mark.parametrize("kind", [*KINDS, *FEATURES])
def test_what_a_killed_daemon_acknowledged_is_there(tmp_path: Path, kind: str, cache: str) -> None:
    killed = Round(tmp_path, kind, cache, seed=7, kills=2)
    killed.run()
    assert killed.tally.kills >= 2
    assert killed.tally.acknowledged


@pytest.mark.parametrize(("kind", "cache"), [("lazy", "none"), ("accurate", "directsync")])
def test_what_a_killed_daemon_wrote_past_the_page_cache_is_there(tmp_path: Path, kind: str, cache: str) -> None:
    """On a disk that takes its time: what the dead one has under way ends while the next one begins."""
    try:
        with throttle(tmp_path) as slow:
            killed = Round(tmp_path, kind, cache, seed=8, kills=1, slow=slow)
            killed.run()
    except NoThrottle as reason:
        pytest.skip(str(reason))
    assert killed.tally.acknowledged
