"""The client of several daemons at once, for programs: their disks are frozen at one instant."""

import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

from vhost.client import Control, ControlError, given


def snapshot_together(
    paths: Sequence[str | os.PathLike[str]], names: Sequence[str], **wish: Any
) -> list[dict[str, Any]]:
    """Freeze the disks of the daemons at *paths* as *names* at one instant, or none of them. -> as of `snapshot`, each.

    *wish* is as of `Control.snapshot`, for each.
    Raises: ControlError.
    """
    with ExitStack() as stack:
        controls = [stack.enter_context(Control(path)) for path in paths]
        try:
            _ask_each(controls, "snapshot-begin", [{"name": name, **given(**wish)} for name in names])
            for _ in ("requests wait", "the overlays have their names"):
                _ask_each(controls, "snapshot-next", [{}] * len(controls))
            return _ask_each(controls, "snapshot-next", [{}] * len(controls))
        except ControlError:
            for control in controls:
                with suppress(ControlError):  # of who has not begun, or is done
                    control.ask("snapshot-cancel")
            raise


def _ask_each(controls: Sequence[Control], command: str, arguments: Sequence[dict[str, Any]]) -> list[Any]:
    """Ask all at once, and wait for all. Raises: ControlError, the first one."""
    results, errors = [], []
    for control, words in zip(controls, arguments, strict=True):
        control.send(command, **words)
    for control in controls:
        try:
            results.append(control.receive())
        except ControlError as error:
            errors.append(ControlError(f"{control.path}: {str(error).removeprefix(f'{control.path}: ')}"))
    if errors:
        raise errors[0]
    return results
