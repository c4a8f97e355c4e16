"""Tests of what the data plane does alone, which a host that makes it wait sends through Python for a while."""

from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

TRIES = 5


class Disturbed(Exception):
    """The host made the daemon wait: what it counted says nothing."""


def assert_few_in_python(told: Mapping[str, int], limit: int) -> None:
    """Fewer than *limit* requests entered Python. Raises: Disturbed, AssertionError."""
    if told["python_requests"] >= limit and told["stalls"]:
        raise Disturbed
    assert told["python_requests"] < limit


def calm(test: Callable[..., None]) -> Callable[..., None]:
    """Run *test* again in a directory of its own while it is `Disturbed`; at last it is skipped."""

    @wraps(test)
    def repeated(*, tmp_path: Path, **given: Any) -> None:
        for number in range(TRIES):
            place = tmp_path / str(number)
            place.mkdir()
            try:
                test(tmp_path=place, **given)
                return
            except Disturbed:
                continue
        pytest.skip(f"the host made the daemon wait in each of {TRIES} runs")

    return repeated
