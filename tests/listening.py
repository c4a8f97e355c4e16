"""Waiting for a process to listen on its socket, without being its first front-end by accident."""

import os
import select
import subprocess
from pathlib import Path

from tests.frontend import F_DISCARD, F_FLUSH, F_WRITE_ZEROES, FrontEnd

LISTENING = "00010000"  # __SO_ACCEPTCON among the flags in /proc/net/unix


def visit(
    process: "subprocess.Popen[str]", path: Path, features: int = F_FLUSH | F_DISCARD | F_WRITE_ZEROES
) -> FrontEnd:
    """Connect to *process* at *path* once it listens there."""
    wait_for_listener(process, path)
    return FrontEnd(path, features=features)


def wait_for_listener(process: "subprocess.Popen[str]", path: Path) -> None:
    """Return once *process* listens at *path*."""
    ended = os.pidfd_open(process.pid)
    try:
        while not is_listening(path):
            assert not select.select([ended], [], [], 0.01)[0], "the process ended before it listened"
    finally:
        os.close(ended)


def is_listening(path: Path) -> bool:
    """Whether the kernel knows a listening socket of that name."""
    sockets = (line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text().splitlines())
    return any(fields[3] == LISTENING and fields[7:] == [os.fspath(path)] for fields in sockets)
