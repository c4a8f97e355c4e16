"""A monitor of qemu-storage-daemon: what it is asked, and what it tells by itself."""

import json
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

Message = dict[str, Any]


def monitor_options(path: Path) -> list[str]:
    """Of the daemon, so that it listens at *path*."""
    return [
        *("--chardev", f"socket,id=monitor,path={path},server=on,wait=off"),
        *("--monitor", "chardev=monitor"),
    ]


class Monitor(AbstractContextManager["Monitor"]):
    """The monitor at *path*, connected to with the first command."""

    def __init__(self, path: Path, patience: float) -> None:
        """*patience*: seconds of silence until it is given up."""
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(patience)
        self._lines = self._socket.makefile("r")
        self._is_connected = False
        self._events: list[Message] = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # else who still waits for an answer holds the lines
        self._lines.close()
        self._socket.close()

    def ask(self, execute: str, **arguments: Any) -> Any:
        """What it returns. Raises: RuntimeError with what it says instead; OSError."""
        if not self._is_connected:
            self._socket.connect(str(self._path))
            self._is_connected = True
            self.ask("qmp_capabilities")
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._socket.sendall(json.dumps({"execute": execute, "arguments": named}).encode())
        while not {"return", "error"} & (answer := self._next()).keys():
            self._events.append(answer)  # or the greeting
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["return"]

    def wait_for(self, is_wanted: Callable[[Message], bool]) -> Message:
        """The first event that *is_wanted*, those before it forgotten. Raises: RuntimeError, OSError."""
        while True:
            event = self._events.pop(0) if self._events else self._next()
            if is_wanted(event):
                return event

    def _next(self) -> Message:
        line = self._lines.readline()
        if not line:
            raise RuntimeError("qemu-storage-daemon is gone")
        message: Message = json.loads(line)
        return message
