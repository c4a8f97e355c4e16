"""One run of QEMU: boot the guest, hand it a job, follow its console, stop it whatever happens."""

import json
import os
import re
import select
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

from guest.kernel import Kernel
from guest.program import LEASH, Failure, find_program
from guest.transcript import Transcript

TAIL_LINES = 25
CONTROL_TIMEOUT = 300.0  # nothing is measured by it; a busy host takes its time
COMMAND_LINE = "console=ttyS0 quiet panic=0 mitigations=off nokaslr no_timer_check tsc=reliable random.trust_cpu=on"


class GuestFailure(Failure):
    """The guest did not do its job; the message ends with the last lines of its console."""


@dataclass(frozen=True)
class Result:
    """What a finished guest left: its job's exit status, the files it reported, its console."""

    status: int
    files: dict[str, str]
    console: list[str]
    seconds_to_job: float
    seconds: float


def vhost_user_disk(
    socket_path: Path, *, queues: int | None = None, packed: bool = False, reconnect: int | None = None
) -> list[str]:
    """QEMU's arguments for a disk served by the vhost-user back-end that listens at *socket_path*.

    With *reconnect*, QEMU looks for the next back-end there every so many seconds when one has died.
    """
    name = "disk-" + re.sub(r"[^A-Za-z0-9]", "-", os.fspath(socket_path))
    device = f"vhost-user-blk-pci,chardev={name}" + ("" if queues is None else f",num-queues={queues}")
    chardev = f"socket,id={name},path={_escaped(socket_path)}"
    if reconnect is not None:
        chardev += "," + reconnect_option(reconnect)
    return ["-chardev", chardev, "-device", device + (",packed=on" if packed else "")]


@cache
def _version(qemu: str) -> tuple[int, int]:
    said = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\d+)\.(\d+)", said)
    if found is None:
        raise Failure(f"{qemu} --version says {said.strip()!r}")
    return int(found[1]), int(found[2])


def qemu_version() -> tuple[int, int]:
    """Major and minor of the QEMU that boots our guests."""
    return _version(_qemu())


def reconnect_option(seconds: int) -> str:
    """How a socket chardev is told to connect again: QEMU 9.2 counts milliseconds, 11.1 knows nothing else."""
    return f"reconnect-ms={1000 * seconds}" if qemu_version() >= (9, 2) else f"reconnect={seconds}"


def _qemu() -> str:
    """This host's, or that of the directory QEMU_BIN."""
    name = "qemu-system-x86_64"
    directory = os.environ.get("QEMU_BIN")
    return os.path.join(directory, name) if directory else str(find_program(name, "qemu-system-x86"))


def builtin_disk(image: Path, *, cache: str, trace: Path) -> list[str]:
    """QEMU's arguments for a qcow2 disk served by QEMU itself, which lists all it submits to the host in *trace*.

    The list is complete with aio=io_uring only; writing it costs the guest nothing measurable.
    """
    drive = f"if=virtio,file={_escaped(image)},format=qcow2,cache={cache},aio=io_uring"
    return ["-drive", drive, "-trace", "luring_co_submit", "-D", os.fspath(trace)]


def _escaped(path: Path) -> str:
    return os.fspath(path).replace(",", ",,")


class Guest:
    """A guest that runs *job*, a shell script, with *disks* as /dev/vda, /dev/vdb and so on.

    With *root*, such as /dev/vda, the job runs on the file system of that disk. Use as a context manager;
    leaving it kills whatever still runs. *on_line* sees what the guest prints as it arrives, without marks and
    reported files.
    """

    def __init__(
        self,
        kernel: Kernel,
        initrd: Path,
        job: str,
        disks: Sequence[str] = (),
        *,
        root: str | None = None,
        accelerator: str = "tcg",
        cpus: int = 1,
        memory_mib: int = 512,
        on_line: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._job = job
        self._arguments = [
            *(
                _qemu(),
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
            ),
            *("-machine", "pc,memory-backend=ram", "-accel", accelerator, "-cpu", "max", "-smp", str(cpus)),
            *("-m", f"{memory_mib}M", "-object", f"memory-backend-memfd,id=ram,size={memory_mib}M,share=on"),
            *("-kernel", str(kernel.image), "-initrd", str(initrd), "-serial", "stdio"),
            *("-append", COMMAND_LINE + (f" guest.root={root}" if root else "")),
            *disks,
        ]
        self._on_line = on_line
        self._transcript = Transcript()
        self._seconds_to_job = 0.0
        self._partial = b""
        self._events: deque[dict[str, Any]] = deque()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            job = stack.enter_context(open(os.memfd_create("job"), "w+"))
            job.write(self._job)
            job.flush()
            ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
            self._started = time.monotonic()
            self._process = stack.enter_context(self._launch(job.fileno(), theirs.fileno()))
            stack.callback(self._process.kill)
            theirs.close()
            ours.settimeout(CONTROL_TIMEOUT)
            self._control = stack.enter_context(ours.makefile("rw"))
            self._answer("QMP")
            self.command("qmp_capabilities")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def _launch(self, job_fd: int, control_fd: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [
                *LEASH,
                *self._arguments,
                *("-fw_cfg", f"name=opt/guest/job,file=/dev/fd/{job_fd}"),
                *("-chardev", f"socket,id=control,fd={control_fd}", "-mon", "chardev=control,mode=control"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(job_fd, control_fd),
        )

    def wait_for(self, text: str, timeout: float) -> str:
        """Follow the console until a line contains *text* and return that line."""
        for line in self._lines(timeout):
            if text in line:
                return line
        raise self._failure(f"QEMU ended before the guest printed {text!r}")

    def finish(self, timeout: float, *, check: bool = True) -> Result:
        """Follow the console until QEMU has ended; with *check*, a job that failed raises."""
        for _line in self._lines(timeout):
            pass
        seconds = time.monotonic() - self._started
        job_status = self._transcript.status
        if status := self._process.wait():
            raise self._failure(f"QEMU ended with status {status}")
        if job_status is None:
            raise self._failure("QEMU ended before the guest's job did")
        if check and job_status:
            raise self._failure(f"the guest's job failed with status {job_status}")
        return Result(job_status, self._transcript.files, self._transcript.lines, self._seconds_to_job, seconds)

    def command(self, name: str, **arguments: Any) -> Any:
        """Run one QMP command, such as "stop" or "system_reset", and return its answer."""
        self._control.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
        return self._answer("return")

    def unplug(self, device: str) -> None:
        """Take out the device with this id; returns once the guest has let go of it and QEMU forgotten it."""
        self.command("device_del", id=device)
        while self.wait_for_event("DEVICE_DELETED").get("device") != device:  # its parts are told without an id
            pass

    def wait_for_event(self, *names: str) -> dict[str, Any]:
        """Return the data of the next event that has one of *names*, passing over others."""
        while True:
            event = self._events.popleft() if self._events else self._message()
            if event.get("event") in names:
                return dict(event.get("data", {}))

    def _answer(self, key: str) -> Any:
        """Return the value of the next message that has *key*; events before it are kept."""
        while key not in (message := self._message()):
            if "event" in message:
                self._events.append(message)
        return message[key]

    def _message(self) -> dict[str, Any]:
        """The next thing that QEMU says on its control socket."""
        try:
            self._control.flush()
            if line := self._control.readline():
                message: dict[str, Any] = json.loads(line)
                if "error" in message:
                    raise self._failure(f"QEMU refused: {message['error']['desc']}")
                return message
        except TimeoutError:
            raise self._failure(f"QEMU said nothing for {CONTROL_TIMEOUT:.0f} s") from None
        except ConnectionError:
            pass
        raise self._failure("QEMU ended")

    def _lines(self, timeout: float) -> Iterator[str]:
        """Yield console lines as they arrive until QEMU closes its output; raise when the guest is beyond hope."""
        deadline = time.monotonic() + timeout
        while self._read(deadline - time.monotonic()):
            *complete, self._partial = re.split(rb"[\r\n]+", self._partial)
            for line in (raw.decode(errors="replace") for raw in complete if raw):
                self._add(line)
                yield line
            if self._transcript.is_over:
                raise self._failure(f"the guest gave up: {self._transcript.trouble}")
            if time.monotonic() > deadline:
                raise self._failure(f"the guest was not done after {timeout:.0f} s")

    def _read(self, timeout: float) -> bool:
        """Append console output to the partial line; False at its end."""
        pipe = self._process.stdout
        assert pipe is not None
        if not select.select([pipe], [], [], max(timeout, 0))[0]:
            return True
        data = os.read(pipe.fileno(), 65536)
        self._partial += data
        return bool(data)

    def _add(self, line: str) -> None:
        is_for_people = self._transcript.add(line)
        if self._transcript.begun and not self._seconds_to_job:
            self._seconds_to_job = time.monotonic() - self._started
        if is_for_people:
            self._on_line(line)

    def _failure(self, reason: str) -> GuestFailure:
        """Stop QEMU and describe *reason* with the end of the console below it."""
        self._process.kill()
        while self._read(CONTROL_TIMEOUT):
            pass
        lines = [*self._transcript.lines, *self._partial.decode(errors="replace").splitlines()]
        return GuestFailure("\n".join([reason, *(f"  | {line}" for line in lines[-TAIL_LINES:])]))
