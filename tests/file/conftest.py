"""What every file test owes: no descriptor and no shared mapping is left behind."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forge import FORGE


def _held() -> tuple[int, list[str]]:
    maps = Path("/proc/self/maps").read_text().splitlines()
    return len(os.listdir("/proc/self/fd")), [line.split(maxsplit=5)[-1] for line in maps if line.split()[1][3] == "s"]


@pytest.fixture(autouse=True)
def _nothing_is_left_open() -> Iterator[None]:
    FORGE.start()
    before = _held()
    yield
    assert _held() == before
