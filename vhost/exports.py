"""Frozen images offered over NBD beside a disk that is served: each by a `qcow2 serve-nbd` process of its own.

What clients of an export do costs the guest nothing but processor time: that process has the image read-only, no guest
memory and nothing of the data plane. It ends when its standard input does, so no export outlives the daemon.
"""

import logging
import os
import select
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ring.thread import start_deaf

PROGRAM = """\
import sys
library = sys.argv.pop(1)
if library not in sys.path:
    sys.path.insert(0, library)
from qcow2.tool import program
sys.exit(program())"""
LIBRARY = str(Path(__file__).resolve().parents[1])  # where our packages are: of an installed program only it knows
PATIENCE_SECONDS = 10.0  # with a process that is to begin, or to end
KILLED_SECONDS = 1.0  # with one that was killed

log = logging.getLogger("vhost")


class ExportRefused(Exception):
    """There is no such export, or none can be made; one line says why."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where clients come to: a Unix socket, or a port of an address."""

    socket: str | None
    address: str = "localhost"
    port: int = 0

    @property
    def options(self) -> list[str]:
        """Of `qcow2 serve-nbd`."""
        if self.socket is not None:
            return [f"--socket={self.socket}"]
        return [f"--bind={self.address}", f"--port={self.port}"]

    def uri(self, scheme: str) -> str:
        """As clients take it."""
        if self.socket is not None:
            return f"{scheme}+unix:///?socket={quote(os.fsencode(self.socket))}"
        address = f"[{self.address}]" if ":" in self.address else self.address
        return f"{scheme}://{address}:{self.port}"


class _Export:
    """One process, and a thread that passes on what it says."""

    def __init__(self, file: str, uri: str, command: list[str]) -> None:
        self.uri = uri
        self._file = file
        self._said = ""
        self._is_offered = False
        self._is_settled = threading.Event()  # whether it is offered
        ends: list[int] = []  # Popen would leave those of its own pipes open where one of them cannot be had
        try:
            for _ in ("in", "out", "error"):
                ends += os.pipe()
            self._process = subprocess.Popen(command, stdin=ends[0], stdout=ends[3], stderr=ends[5])
        except BaseException:
            _close_all(ends)
            raise
        _close_all([ends[0], ends[3], ends[5]])
        self._stdin, self._stdout = os.fdopen(ends[1], "wb"), os.fdopen(ends[2], "rb")
        self._stderr = os.fdopen(ends[4], errors="surrogateescape")  # it may name a file
        self._listener = threading.Thread(target=self._listen, name="export", daemon=True)
        start_deaf(self._listener)

    def _listen(self) -> None:
        with self._stderr as stderr:
            for line in stderr:
                self._said = line.strip()
                log.warning("export of %s: %s", self._file, self._said)
        status = self._process.wait()  # for one that nobody else waits for any more
        self._is_settled.wait()
        if self._is_offered:
            how = f"killed by signal {-status}" if status < 0 else self._said or f"status {status}"
            log.error("export of %s: has ended by itself, %s", self._file, how)

    def wait_until_ready(self, patience: float) -> None:
        """Return once clients may come. Raises: ExportRefused, after *patience* seconds at the latest."""
        with self._stdout as stdout:
            poll = select.poll()
            poll.register(stdout, select.POLLIN)
            if not poll.poll(patience * 1000):
                self._kill()
                raise ExportRefused(f"it has not begun within {patience:g} s: does the storage hang?")
            is_ready = bool(stdout.readline())
        if not is_ready:
            self.end()
            raise ExportRefused(self._said.removeprefix("qcow2: ") or "the export has ended before it began")
        self._is_offered = True
        self._is_settled.set()

    @property
    def is_alive(self) -> bool:
        """Whether it can still be used."""
        return self._process.poll() is None

    def tell_to_end(self) -> None:
        """Its clients get what they are owed, and no more."""
        self._is_offered = False
        self._is_settled.set()
        self._stdin.close()

    def end(self) -> None:
        """Return once it is gone, or cannot be made to go."""
        self.tell_to_end()
        try:
            self._process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill()
        else:
            self._listener.join()

    def _kill(self) -> None:
        self.tell_to_end()
        self._process.kill()
        try:
            self._process.wait(KILLED_SECONDS)
        except subprocess.TimeoutExpired:  # it sleeps in the kernel, on a dead network file system say
            log.error("export of %s: process %d was killed, and has not ended", self._file, self._process.pid)
        else:
            self._listener.join()


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ExportRefused(f"{name} is a text, not {value!r}")
    return value


def _texts(values: object, name: str) -> list[str]:
    if not isinstance(values, list | tuple):
        raise ExportRefused(f"{name} are a list of texts, not {values!r}")
    return [_text(value, name) for value in values]


def _path(value: object, name: str) -> str:
    """One that leads to the same place from wherever a client runs."""
    path = _text(value, name)
    if not os.path.isabs(path):
        raise ExportRefused(f"{name} {path!r} is not absolute: it would be seen from the daemon's directory")
    return path


def _place_of(socket: object, address: object, port: object) -> Place:
    if (socket is None) == (port == 0):
        raise ExportRefused("either socket or port says where clients come to")
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 1 << 16:
        raise ExportRefused(f"{port!r} is not a port")
    return Place(None if socket is None else _path(socket, "socket"), _text(address, "address"), port)


def _describe(file: str, export: _Export) -> dict[str, Any]:
    return {"export": file, "uri": export.uri, "running": export.is_alive}


class Exports:
    """The exports of one daemon, which serves *image*; a context manager that ends them.

    For one thread at a time, but for `list`.

    *allowed*: directories beneath which lies what exported images name; None: anywhere. *refusal*: why there are none.
    *patience*: seconds that a process has to begin.
    """

    def __init__(
        self, image: str, allowed: tuple[str, ...] | None, refusal: str = "", patience: float = PATIENCE_SECONDS
    ) -> None:
        self._image = Path(image)
        self._allowed = allowed or ()
        self._refusal = refusal
        self._patience = patience
        self._exports: dict[str, _Export] = {}  # never changed, but replaced: any thread may read it

    def start(
        self,
        file: object,
        socket: object = None,
        address: object = "localhost",
        port: object = 0,
        bitmaps: object = (),
        certificates: object = None,
        no_tls: object = False,
    ) -> dict[str, Any]:
        """Offer *file*, a qcow2 image as seen from the directory of the image, which nobody writes to.

        At *socket*, a path, or *port* of *address*; with *certificates*, a directory, nothing is said without TLS.
        An address that others than this host reach takes those, or *no_tls*.
        Raises: ExportRefused.
        """
        file, names = _text(file, "file"), _texts(bitmaps, "bitmaps")
        place = _place_of(socket, address, port)
        directory = None if certificates is None else _path(certificates, "certificates")
        if not isinstance(no_tls, bool):
            raise ExportRefused(f"no-tls is true or false, not {no_tls!r}")
        tls = [] if directory is None else [f"--tls-creds={directory}"]
        uri = place.uri("nbd" if directory is None else "nbds")
        options = [*place.options, *tls, *(["--no-tls"] if no_tls else [])]
        return self._start(file, uri, [*options, *(f"--bitmap={name}" for name in names)])

    def _start(self, file: str, uri: str, wanted: list[str]) -> dict[str, Any]:
        if self._refusal:
            raise ExportRefused(self._refusal)
        if file in self._exports and self._exports[file].is_alive:
            raise ExportRefused(f"{file} is exported already")
        self._forget(file)
        options = ["--read-only", "--persistent", "--shared=0", "--allocation-depth"]
        options += ["--end-with-input", "--pid-file=/dev/stdout"]
        options += [f"--allow-files={directory}" for directory in self._allowed]
        path = self._image.resolve().parent / file
        command = [sys.executable, "-P", "-c", PROGRAM, LIBRARY, "serve-nbd", *options, *wanted, "--", str(path)]
        try:
            export = _Export(file, uri, command)
        except OSError as error:
            raise ExportRefused(f"{sys.executable}: {error.strerror}") from error
        export.wait_until_ready(self._patience)
        self._exports = {**self._exports, file: export}
        return _describe(file, export)

    def stop(self, file: object) -> None:
        """End the export of *file*; its clients are cut off. Raises: ExportRefused if there is none."""
        file = _text(file, "file")
        if file not in self._exports:
            raise ExportRefused(f"{file} is not exported")
        self._forget(file)

    def list(self) -> list[dict[str, Any]]:
        """What is exported, and was and has ended by itself. For any thread."""
        return [_describe(file, export) for file, export in self._exports.items()]

    def _forget(self, file: str) -> None:
        if file in self._exports:
            self._exports[file].end()
            self._exports = {name: export for name, export in self._exports.items() if name != file}

    def __enter__(self) -> "Exports":
        return self

    def __exit__(self, *exc_info: object) -> None:
        for export in self._exports.values():
            export.tell_to_end()
        for export in self._exports.values():
            export.end()
