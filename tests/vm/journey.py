"""A guest that moves from one QEMU to another; `Journey.guest` is the one that has it now."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from guest import Backend, Guest

Start = Callable[[Backend, list[str]], Guest]
CAPABILITIES = [{"capability": name, "state": True} for name in ("events", "pause-before-switchover")]


class Journey:
    """One guest, which begins on the daemon *first*. A context manager.

    *start(daemon, arguments)* makes the guest of another QEMU, whose disk *daemon* serves; *address* is a path for the
    socket through which it moves.
    """

    def __init__(self, start: Start, first: Backend, address: Path) -> None:
        self._start = start
        self._first = first
        self._address = f"unix:{address}"
        self._running = ExitStack()

    def __enter__(self) -> Self:
        self.guest = self._boot(self._running, self._first)
        return self

    def __exit__(self, *error: Any) -> None:
        self._running.close()

    def _boot(self, stack: ExitStack, daemon: Backend, *arguments: str) -> Guest:
        guest = stack.enter_context(self._start(daemon, list(arguments)))
        guest.command("migrate-set-capabilities", capabilities=CAPABILITIES)
        guest.command("migrate-set-parameters", **{"max-bandwidth": 1 << 30, "downtime-limit": 5000})
        return guest

    def _begin_to_move(self, stack: ExitStack, daemon: Backend) -> Guest:
        """Start another QEMU and the migration to it, which will stop before the guest is handed over."""
        target = self._boot(stack, daemon, "-incoming", "defer")
        target.command("migrate-incoming", uri=self._address)
        self.guest.command("migrate", uri=self._address)
        return target

    def move(self, daemon: Backend) -> None:
        """Migrate the guest, which goes on in another QEMU on *daemon*."""
        with ExitStack() as stack:
            target = self._begin_to_move(stack, daemon)
            wait_for_migration(self.guest, "pre-switchover")
            self.guest.command("migrate-continue", state="pre-switchover")
            wait_for_migration(self.guest, "completed")
            target.wait_for_event("RESUME")
            self._running.close()
            self._running.push(stack.pop_all())
        self.guest = target

    def cancel(self, daemon: Backend, status: str) -> None:
        """Begin to migrate the guest, and think better of it when the migration is at *status*; the guest stays."""
        with ExitStack() as stack:
            self._begin_to_move(stack, daemon)
            wait_for_migration(self.guest, status)
            self.guest.command("migrate_cancel")
            wait_for_migration(self.guest, "cancelled")


def wait_for_migration(guest: Guest, status: str) -> None:
    while (now := guest.wait_for_event("MIGRATION")["status"]) != status:
        assert now != "failed", "the migration failed"
