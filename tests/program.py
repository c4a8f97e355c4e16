"""The two programs as a user runs them: `qcow2` once, `vhost-user-qcow2` for as long as a test needs it."""

import fcntl
import itertools
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.forge import popen
from tests.patience import TIMEOUT

TOOL = Path(sys.executable).with_name("qcow2")
DAEMON = Path(sys.executable).with_name("vhost-user-qcow2")
SERIAL = itertools.count()


def run(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run one of our programs to its end; *options* are those of Popen."""
    with popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        try:
            said, complained = process.communicate(timeout=TIMEOUT)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(words, process.returncode, said, complained)


def qcow2_tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the `qcow2` tool to its end."""
    return run(TOOL, *map(str, arguments))


def qcow2_tool_ok(*arguments: str | Path) -> str:
    """Run the `qcow2` tool, which must succeed, and return what it printed."""
    done = qcow2_tool(*arguments)
    assert done.returncode == 0, f"qcow2 {' '.join(map(str, arguments))}: exit {done.returncode}: {done.stderr}"
    return done.stdout


def complaints(said: str) -> str:
    """What a daemon said, but for the one line that io_uring is forbidden where we are: see `tests.refused`."""
    return "".join(line for line in said.splitlines(keepends=True) if "using threads" not in line)


class Daemon:
    """A `vhost-user-qcow2` process on a listening socket that exists before it does, so nobody waits for its start."""

    def __init__(self, image: Path, *options: str, under: Sequence[str] = ()) -> None:
        """*under* is a command that runs the daemon's."""
        self.image = image
        self.under = under
        self.options = options
        self.socket_path = image.with_name(f"{image.name}.{next(SERIAL)}.sock")

    def __enter__(self) -> "Daemon":
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(self.socket_path))
        self.listener.listen()
        fd = self.listener.fileno()
        command = [*self.under, str(DAEMON), f"--fd={fd}", f"--blk-file={self.image}", *self.options]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        if self.under or any(option.startswith("--sandbox") for option in self.options):
            self.process = subprocess.Popen(command, pass_fds=[fd], text=True, **pipes)
        else:
            self.process = popen(command, pass_fds=[fd], **pipes)
        self.listener.close()  # the daemon's copy is the only one: once it is dead, a connect is refused
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        _, said = self.process.communicate(timeout=TIMEOUT)
        self.socket_path.unlink(missing_ok=True)
        if error is not None and said:
            error.add_note(f"the daemon said: {said}")

    def forbid_mappings(self) -> None:
        """Let it change the image by calls alone, which can fail: where addresses are few it maps no file."""
        resource.prlimit(self.process.pid, resource.RLIMIT_AS, (1 << 46, resource.RLIM_INFINITY))

    def kill(self, *, at_once: bool = False) -> None:
        """SIGKILL, and wait until it is gone; unless *at_once*, until its last transfers have ended, too.

        The kernel ends those after the process, and keeps its locks on the image for as long.
        """
        self.process.kill()
        self.process.wait(TIMEOUT)
        assert self.process.returncode == -signal.SIGKILL, self._said()
        if not at_once:
            with self.image.open("r+b") as file:
                fcntl.fcntl(file, fcntl.F_OFD_SETLKW, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))

    def stop(self, by: signal.Signals = signal.SIGTERM) -> None:
        """A clean end: exit status 0."""
        self.process.send_signal(by)
        self.process.wait(TIMEOUT)
        assert self.process.returncode == 0, self._said()

    def _said(self) -> str:
        assert self.process.stderr is not None
        return f"exit {self.process.returncode}: {self.process.stderr.read()}"
