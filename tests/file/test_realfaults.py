"""Law 7 on the real thing: a system call of the daemon on its image fails; `make realfaults` lets each of them fail.

A failure names setting and fault; `python -m tests.realfault --kind ... --phase ... --option ...` is where to look.
"""

import random
from pathlib import Path

import pytest

from tests.kill.images import KINDS
from tests.realfault.campaign import calls_of, faults, settings
from tests.realfault.trial import live

LIVES = 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_host_that_fails_is_answered_honestly(tmp_path: Path, kind: str) -> None:
    draw = random.Random(f"1 {kind}")
    setting = draw.choice([s for s in settings(tmp_path, 1) if s.kind == kind and s.phase == "work"])
    calls = calls_of(setting, tmp_path)
    assert len(calls) > 20
    for _ in range(LIVES):
        live(setting, draw.choice(list(faults(calls, draw.randint(1, len(calls))))), tmp_path)
