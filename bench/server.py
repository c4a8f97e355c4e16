"""A server of one image as a child process: ours or QEMU's, on a socket that listened before it started."""

import json
import signal
import socket
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any

from vhost.option import CacheMode

QEMU = "qemu-storage-daemon"
LEASH = ("setpriv", "--pdeathsig", "KILL")  # dies with us, also when we are killed
STOP_TIMEOUT = 120  # seconds; a clean close of a lazy image writes all refcounts


class ServerFailure(Exception):
    """A server did not start, or did not stop as asked."""


class Aio(Enum):
    """How qemu-storage-daemon reaches the disk."""

    IO_URING = "io_uring"
    THREADS = "threads"
    NATIVE = "native"  # O_DIRECT only


@dataclass(frozen=True, slots=True)
class Service:
    """What is served, and how."""

    image: Path
    cache: CacheMode
    queues: int = 1
    writable: bool = True
    options: tuple[str, ...] = ()  # of ours
    data_file: Path | None = None
    key: Path | None = None  # of an encrypted image


def our_command(service: Service, fd: int) -> list[str]:
    """The daemon of this project, installed beside the Python that runs us."""
    program = Path(sysconfig.get_path("scripts"), "vhost-user-qcow2")
    return [
        str(program),
        f"--fd={fd}",
        f"--blk-file={service.image}",
        f"--cache={service.cache.name.lower()}",
        f"--num-queues={service.queues}",
        "--stats",
        *([] if service.writable else ["--read-only"]),
        *([] if service.key is None else [f"--key-file={service.key}"]),
        *service.options,
    ]


def qemu_command(service: Service, fd: int, aio: Aio, program: str = QEMU, *, has_io_thread: bool = True) -> list[str]:
    """QEMU's storage daemon, with an I/O thread of its own or none; writethrough is the export's."""
    direct = "on" if service.cache.direct else "off"
    no_flush = "off" if service.cache.sync else "on"
    read_only = "off" if service.writable else "on"
    node = f"cache.direct={direct},cache.no-flush={no_flush},read-only={read_only},discard=unmap"
    writable = "on" if service.writable else "off"
    writethrough = "off" if service.cache.writeback else "on"
    file, disk, more = f"driver=file,aio={aio.value},{node}", f"driver=qcow2,node-name=disk,file=file,{node}", []
    if service.data_file is not None:
        more += ["--blockdev", f"{file},node-name=data,filename={service.data_file}"]
        disk += ",data-file=data"
    if service.key is not None:
        more += ["--object", f"secret,id=key,file={service.key}"]
        disk += ",encrypt.format=luks,encrypt.key-secret=key"
    thread = "iothread=iothread," if has_io_thread else ""
    return [
        program,
        *(["--object", "iothread,id=iothread"] if has_io_thread else []),
        *("--blockdev", f"{file},node-name=file,filename={service.image}"),
        *more,
        *("--blockdev", disk),
        "--export",
        f"vhost-user-blk,id=export,node-name=disk,addr.type=fd,addr.str={fd},"
        f"{thread}writable={writable},writethrough={writethrough},num-queues={service.queues}",
    ]


class Server(AbstractContextManager["Server"]):
    """The program of *command*, which gets the number of its listening socket. Leaving the context kills it."""

    def __init__(self, command: Sequence[str], listening: socket.socket) -> None:
        self.command = tuple(command)
        self._listening = listening
        self._stack = ExitStack()

    def __enter__(self) -> "Server":
        with ExitStack() as stack:
            self._complaints = stack.enter_context(tempfile.TemporaryFile("w+"))
            self._process = stack.enter_context(
                subprocess.Popen(
                    [*LEASH, *self.command],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=self._complaints,
                    text=True,
                    pass_fds=[self._listening.fileno()],
                    process_group=0,  # Ctrl-C is for us; we end it
                )
            )
            stack.callback(self._process.kill)
            self._listening.close()  # now a server that dies takes its socket along
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def complaints(self) -> str:
        """What it wrote to stderr so far."""
        self._complaints.seek(0)
        return " ".join(self._complaints.read().split())

    def stop(self) -> dict[str, Any]:
        """End it cleanly -> the counters it printed last, if it does so. Raises: ServerFailure."""
        self._process.send_signal(signal.SIGTERM)
        try:
            output, _ = self._process.communicate(timeout=STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise ServerFailure(f"{self.command[0]} still runs {STOP_TIMEOUT} s after SIGTERM") from None
        if self._process.returncode:
            raise ServerFailure(f"{self.command[0]} ended with {self._process.returncode}: {self.complaints()}")
        lines = output.splitlines()
        return dict(json.loads(lines[-1])) if lines else {}


def listen() -> tuple[socket.socket, str]:
    """A listening Unix socket at an address without a file, and that address."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind("")  # the kernel chooses a free abstract address
    listening.listen(1)
    return listening, listening.getsockname()


def connect(address: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    return connection
