"""A vhost-user back-end as a child process: started, waited for, stopped by SIGTERM."""

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from guest.program import LEASH, Failure

LISTENING = "00010000"  # __SO_ACCEPTCON among the flags in /proc/net/unix


class BackendFailure(Failure):
    """The back-end did not start, did not stop as asked, or ended when nobody had asked."""


class Backend:
    """The program *command*, which listens at *socket_path*. Leaving the context kills it if stop() did not end it."""

    def __init__(self, command: Sequence[str | Path], socket_path: Path, *, start_timeout: float = 300) -> None:
        self.socket_path = socket_path
        self._command = [os.fspath(word) for word in command]
        self._start_timeout = start_timeout

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            [*LEASH, *self._command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
        try:
            self._wait_until_listening()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def stop(self, timeout: float = 300) -> dict[str, Any]:
        """Send SIGTERM, insist on exit status 0, return the counters the program printed last (empty if none)."""
        self.process.send_signal(signal.SIGTERM)
        try:
            output, _ = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise BackendFailure(f"{self._command[0]} still runs {timeout:.0f} s after SIGTERM") from None
        if self.process.returncode:
            raise BackendFailure(f"{self._command[0]} ended with status {self.process.returncode} after SIGTERM")
        lines = output.splitlines()
        return dict(json.loads(lines[-1])) if lines else {}

    def require_running(self) -> None:
        """Raises: BackendFailure if it has ended; whoever waits for what it serves would wait for ever."""
        if (status := self.process.poll()) is not None:
            raise BackendFailure(f"{self._command[0]} ended with status {status}, and somebody waits for it")

    def _wait_until_listening(self) -> None:
        deadline = time.monotonic() + self._start_timeout
        ended = os.pidfd_open(self.process.pid)
        try:
            while not _is_listening(self.socket_path):
                if select.select([ended], [], [], 0.02)[0]:
                    raise BackendFailure(
                        f"{self._command[0]} ended with status {self.process.wait()} before it listened"
                    )
                if time.monotonic() > deadline:
                    raise BackendFailure(f"{self._command[0]} does not listen at {self.socket_path}")
        finally:
            os.close(ended)

    def _end(self) -> None:
        self.process.kill()
        with self.process:
            pass


def _is_listening(socket_path: Path) -> bool:
    """Look the socket up in the kernel's list, because a trial connection would be a front-end."""
    sockets = (line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text().splitlines())
    return any(fields[3] == LISTENING and fields[7:] == [os.fspath(socket_path)] for fields in sockets)
