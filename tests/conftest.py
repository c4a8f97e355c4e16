"""The tiers: a test is marked pure, file or vm by the directory it is in."""

from pathlib import Path

import pytest

TIERS = ("pure", "file", "border", "vm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        tier = item.path.relative_to(Path(__file__).parent).parts[0]
        if tier in TIERS:
            item.add_marker(tier)
