"""Rounds by name: one that fails is counted, named so that it can be repeated, and its image is kept."""

import shutil
from collections.abc import Callable
from pathlib import Path

from tests.kill.ledger import Lost
from tests.kill.round import Corrupt, Round, Tally
from tests.kill.throttle import Throttle

CACHES = ("writeback", "writethrough", "none", "directsync")
DIRECT = ("none", "directsync")


def run_round(
    directory: Path,
    kind: str,
    cache: str,
    *,
    seed: int,
    kills: int,
    say: Callable[[str], None],
    slow: Throttle | None = None,
    make: type[Round] = Round,
) -> Tally:
    """Kill *kills* daemons or a few more, `Round` says how; *directory* is removed unless something was lost."""
    one = make(directory, kind, cache, seed=seed, kills=kills, slow=slow)
    try:
        one.run()
    except (Lost, Corrupt) as failure:
        say(f"kind {kind}, cache {cache}, seed {seed}, after {one.tally.kills} kills, in {directory}: {failure}")
        one.tally.lost += isinstance(failure, Lost)
        one.tally.corrupt += isinstance(failure, Corrupt)
        return one.tally
    except Exception as error:
        error.add_note(f"kind {kind}, cache {cache}, seed {seed}, after {one.tally.kills} kills, in {directory}")
        raise
    shutil.rmtree(directory)
    return one.tally
