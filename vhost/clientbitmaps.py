"""The bitmaps of a running disk, for programs: `vhost.Control.bitmaps`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Ask = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class LiveBitmap:
    """One bitmap, as it was when it was asked for."""

    name: str
    granularity: int  # bytes of the disk a bit stands for
    enabled: bool  # it records every change
    valid: bool  # what it says can be used
    busy: bool  # a backup by it is under way
    dirty: int | None  # bytes that it reports; None if it is not valid


class LiveBitmaps:
    """Iterating gives them in their order. What is changed is stable on return. All methods raise ControlError."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    def __iter__(self) -> Iterator[LiveBitmap]:
        for each in self._ask("bitmap-list"):
            yield LiveBitmap(**{field: each[field] for field in LiveBitmap.__dataclass_fields__})

    def add(self, name: str, granularity: int | None = None, *, enabled: bool = True) -> None:
        """Make an empty bitmap, a bit for *granularity* bytes; by default a cluster, from 4 to 64 KiB."""
        options = {} if granularity is None else {"granularity": granularity}
        self.change({"action": "add", "name": name, "enabled": enabled, **options})

    def remove(self, name: str) -> None:
        """Forget a bitmap, valid or not."""
        self.change({"action": "remove", "name": name})

    def clear(self, name: str) -> None:
        """Let nothing be dirty."""
        self.change({"action": "clear", "name": name})

    def enable(self, name: str) -> None:
        """Record from now on."""
        self.change({"action": "enable", "name": name})

    def disable(self, name: str) -> None:
        """Record no more."""
        self.change({"action": "disable", "name": name})

    def merge(self, name: str, source: str) -> None:
        """Let *name* report what *source* reports, too."""
        self.change({"action": "merge", "name": name, "source": source})

    def change(self, *actions: dict[str, Any]) -> None:
        """Do several of them at one instant, all or none, as docs/control.md writes them."""
        self._ask("bitmap-change", actions=list(actions))
