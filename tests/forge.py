"""Our programs without the time that Python takes to start: forked from a process that has imported them.

What runs is the program in a process of its own, a child of whoever asked. Nothing is imported any more, so this is
not for tests of a start, nor for programs that are to find less than we do: a sandbox, limits, another user.
"""

import atexit
import ctypes
import fcntl
import gc
import json
import os
import pkgutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("qcow2", "vhost")
DAEMON = "vhost-user-qcow2"  # else the tool, by whatever name
LATE = ("qcow2.library.filesystem", "qcow2.plane.cipher")  # what only some programs load, which tests look at
LENGTH = struct.Struct("<I")
PR_SET_CHILD_SUBREAPER = 36
AT_START = ("PYTHON", "LC_", "LANG")  # begins what Python reads when it starts

libc = ctypes.CDLL(None, use_errno=True)


class Forge:
    """The process that forks; started by its first user."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._lock:
            if self._process is None:
                self._door, theirs = socket.socketpair()
                with theirs:
                    command = [sys.executable, "-m", "tests.forge", str(theirs.fileno())]
                    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)  # as its children's will be
                    self._process = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()], **pipes)
                self._environment = started_with(os.environ)
                atexit.register(self._end)

    def suits(self, environment: dict[str, str] | None) -> bool:
        """Whether a Python that starts now would be as the one that has."""
        return environment is None and self._environment == started_with(os.environ)

    def fork(self, words: list[str], directory: str, fds: dict[int, int]) -> int:
        """Run *words* with these descriptors, by the number that they get; the child's process number."""
        request = {"words": words, "fds": list(fds), "directory": directory, "environment": dict(os.environ)}
        message = json.dumps(request).encode()
        with self._lock:
            _adopt(True)
            try:
                socket.send_fds(self._door, [LENGTH.pack(len(message))], list(fds.values()))
                self._door.sendall(message)
                pid = self._door.recv(LENGTH.size, socket.MSG_WAITALL)
            finally:
                _adopt(False)
            assert pid, self._end()
        return int(LENGTH.unpack(pid)[0])

    def _end(self) -> str:
        """What it said."""
        assert self._process is not None
        self._door.close()
        return self._process.communicate()[1].decode()


FORGE = Forge()


class Forged(subprocess.Popen[str]):
    """As Popen, of one of our programs."""

    def _execute_child(
        self,
        args: Any,
        executable: Any,
        preexec_fn: Any,
        close_fds: Any,
        pass_fds: Any,
        cwd: Any,
        env: Any,
        startupinfo: Any,
        creationflags: Any,
        shell: Any,
        *pipes: int,
        **_: Any,
    ) -> None:
        p2cread, _, _, c2pwrite, _, errwrite = pipes[:6]
        ours = (p2cread, c2pwrite, errwrite)
        fds = {number: number if fd == -1 else fd for number, fd in enumerate(ours)}
        words, directory = [os.fsdecode(word) for word in args], os.path.join(os.getcwd(), os.fsdecode(cwd or ""))
        self.pid = FORGE.fork(words, directory, {**fds, **{fd: fd for fd in pass_fds}})
        self._child_created = True
        self._close_pipe_fds(*pipes[:6])  # type: ignore[attr-defined]


def popen(words: Sequence[str | Path], **options: Any) -> "subprocess.Popen[str]":
    """Start one of our programs, as `subprocess.Popen` with text=True does."""
    FORGE.start()
    kind = Forged if FORGE.suits(options.get("env")) else subprocess.Popen
    return kind(words, text=True, **options)


def started_with(environment: Any) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(AT_START)}


def _adopt(on: bool) -> None:
    """Whether processes whose parents are gone become our children."""
    libc.prctl(PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0)


# the process that forks


def _import_all() -> None:
    for room in ROOMS:
        for found in pkgutil.walk_packages(import_module(room).__path__, f"{room}."):
            if found.name not in LATE and "._" not in found.name:
                import_module(found.name)
    gc.collect()
    gc.freeze()


def _serve(door: socket.socket) -> None:
    _import_all()
    while True:
        length, fds, _, _ = socket.recv_fds(door, LENGTH.size, 64)
        if not length:
            return
        request = json.loads(door.recv(LENGTH.unpack(length)[0], socket.MSG_WAITALL))
        reading, writing = os.pipe()
        if not (between := os.fork()):  # whose child becomes one of our parent's when it ends
            if not (pid := os.fork()):
                door.detach()
                _become(request, fds)
            os.write(writing, LENGTH.pack(pid))
            os._exit(0)
        os.waitpid(between, 0)
        pid = os.read(reading, LENGTH.size)
        for fd in (reading, writing, *fds):
            os.close(fd)
        door.sendall(pid)


def _become(request: dict[str, Any], fds: list[int]) -> NoReturn:
    """The program."""
    wanted = request["fds"]
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD, max(wanted) + 1) for fd in fds]
    for fd, number in zip(moved, wanted, strict=True):
        os.dup2(fd, number)
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2 and number not in wanted:
            with suppress(OSError):  # that of the list itself
                os.close(number)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["words"]
    status = _program(Path(sys.argv[0]).name)()
    threading._shutdown()  # type: ignore[attr-defined] # as Python does at its end, which then takes all apart
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    os._exit(status)


def _program(name: str) -> Any:
    return import_module("vhost.command").main if name == DAEMON else import_module("qcow2.tool").program


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as served:
        _serve(served)
