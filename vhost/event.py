"""What a daemon tells those unasked who subscribed to it."""

from dataclasses import dataclass
from typing import Any

NAMES = ("job", "snapshot", "snapshot-internal", "bitmap", "error")  # documented in docs/control.md


@dataclass(frozen=True, slots=True)
class Event:
    """One line of JSON: {"event": *name*, "data": *data*}."""

    name: str
    data: Any
