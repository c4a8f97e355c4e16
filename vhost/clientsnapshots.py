"""The internal snapshots of a running disk, for programs: `vhost.Control.internal_snapshots`."""

from collections.abc import Callable, Iterator
from typing import Any


class InternalSnapshots:
    """Iterating gives them as `qemu-img info --output=json` does. All methods raise ControlError."""

    def __init__(self, ask: Callable[..., Any]) -> None:
        self._ask = ask

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from self._ask("snapshot-internal-list")

    def create(self, name: str) -> dict[str, Any]:
        """Keep what the disk holds now as *name*, which there is not; stable on return."""
        return dict(self._ask("snapshot-internal-create", name=name))

    def delete(self, name: str) -> None:
        """Forget one; stable on return."""
        self._ask("snapshot-internal-delete", name=name)

    def apply(self, name: str) -> None:
        """Let the disk hold what it held then; refused while a front-end is there."""
        self._ask("snapshot-internal-apply", name=name)
