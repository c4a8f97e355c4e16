"""The client of a daemon's control socket, for programs: `vhost.Control`."""

import json
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from time import monotonic
from typing import Any, Literal

from vhost.clientbitmaps import LiveBitmaps
from vhost.clientsnapshots import InternalSnapshots
from vhost.policy import ENDED

GREETING_TIMEOUT = 5.0  # seconds; a front-end's socket, say, never greets
SILENT = f"whoever listens there has not greeted us in {GREETING_TIMEOUT:g} s"
STEP = 0.5  # seconds between two looks at how far a job is
EventName = Literal["job", "snapshot", "snapshot-internal", "bitmap", "error"]


class ControlError(Exception):
    """The daemon does not do what it was asked for, or there is none; one line says why."""


class DaemonEnded(ControlError):
    """It closed the conversation, between two lines."""


@dataclass(frozen=True, slots=True)
class Job:
    """How it stands with a job of a daemon."""

    job: int
    kind: str
    about: dict[str, Any]  # what was asked for
    state: str  # running, ready, paused, waiting, completed, failed or cancelled
    done: int  # bytes
    total: int
    rate: int  # bytes a second; 0: as fast as it goes
    on_error: str
    error: str  # the last one; empty if there was none
    left: bool = False  # it was cancelled once it was ready, and its copy is there, whole

    def as_json(self) -> dict[str, Any]:
        """As the control socket tells it."""
        return {key.replace("_", "-"): value for key, value in asdict(self).items()}

    @property
    def has_ended(self) -> bool:
        """Whether its state is for good."""
        return self.state in ENDED


@dataclass(frozen=True, slots=True)
class Export:
    """A frozen image that a daemon offers over NBD."""

    file: str
    uri: str
    is_running: bool


@dataclass(frozen=True, slots=True)
class Event:
    """What a daemon tells unasked."""

    name: EventName | str  # a later daemon may tell of more
    data: Any


class Control:
    """A conversation with the daemon whose control socket is at *path*; a context manager. For one thread.

    All methods raise ControlError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.version = 0  # of the protocol, once it is entered
        self.commands: tuple[str, ...] = ()
        self._received = bytearray()
        self._events: deque[Event] = deque()

    def __enter__(self) -> "Control":
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with self._about_daemon():
                self._socket.settimeout(GREETING_TIMEOUT)
                self._socket.connect(self.path)
                line = self._line(monotonic() + GREETING_TIMEOUT)
                if "error" in line:
                    raise ControlError(f"{self.path}: {line['error']}")
                greeting = line.get("vhost-user-qcow2", {})
                self.version, self.commands = greeting.get("version", 0), tuple(greeting.get("commands", ()))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._socket.close()

    def ask(self, command: str, **arguments: Any) -> Any:
        """The result of one command, the arguments as docs/control.md names them."""
        self.send(command, **arguments)
        return self.receive()

    def send(self, command: str, **arguments: Any) -> None:
        """Send one command; `receive` gets its result. Answers come in the order of what was sent."""
        request = {"command": command, **{key.replace("_", "-"): value for key, value in arguments.items()}}
        with self._about_daemon():
            self._socket.settimeout(None)
            self._socket.sendall(json.dumps(request).encode() + b"\n")

    def receive(self) -> Any:
        """The result of the oldest command that was sent and is not answered."""
        with self._about_daemon():
            while True:
                answer = self._line(None)
                if "error" in answer and "event" not in answer:
                    raise ControlError(answer["error"])
                if not self._keep_event(answer):
                    return answer["result"]

    def status(self) -> dict[str, Any]:
        """What is served, how, and to whom."""
        return dict(self.ask("status"))

    def stats(self) -> dict[str, Any]:
        """Counters and latencies."""
        return dict(self.ask("stats"))

    def metrics(self) -> str:
        """The same as OpenMetrics text."""
        return str(self.ask("metrics"))

    def resize(self, nbytes: int) -> int:
        """Let the disk grow. -> its size."""
        return int(self.ask("resize", size=nbytes)["size"])

    def snapshot(
        self,
        name: str,
        *,
        bitmap_add: Sequence[str] = (),
        carry_bitmaps: bool = False,
        options: Mapping[str, str] | None = None,
    ) -> None:
        """Freeze what the disk holds as the file *name*; what is served then has those bitmaps, or carries all over.

        *options* of what is served then, as of `create -o`: cluster_size, compression_type, extended_l2,
        lazy_refcounts, refcount_bits.
        """
        wish = given(bitmap_add=list(bitmap_add), carry_bitmaps=carry_bitmaps, options=dict(options or {}))
        self.ask("snapshot", name=name, **wish)

    @property
    def bitmaps(self) -> LiveBitmaps:
        """The dirty bitmaps of the disk."""
        return LiveBitmaps(self.ask)

    @property
    def internal_snapshots(self) -> InternalSnapshots:
        """Those inside the image."""
        return InternalSnapshots(self.ask)

    def export_start(
        self,
        file: str,
        *,
        socket: str | os.PathLike[str] | None = None,
        port: int = 0,
        address: str = "localhost",
        bitmaps: Sequence[str] = (),
        certificates: str | os.PathLike[str] | None = None,
        no_tls: bool = False,
    ) -> Export:
        """Offer the frozen image *file* over NBD; beyond that host with *certificates*, for TLS alone, or *no_tls*."""
        place = {"port": port, "address": address} if socket is None else {"socket": os.path.abspath(socket)}
        directory = None if certificates is None else os.path.abspath(certificates)
        tls = given(certificates=directory, no_tls=no_tls)
        return _export_of(self.ask("export-start", file=file, bitmaps=list(bitmaps), **place, **tls))

    def export_stop(self, file: str) -> None:
        """End it; who still reads is cut off."""
        self.ask("export-stop", file=file)

    def exports(self) -> list[Export]:
        """What is exported, and was and has ended by itself."""
        return [_export_of(each) for each in self.ask("export-list")]

    def flush(self) -> None:
        """Make every completed write stable."""
        self.ask("flush")

    def set_cache(self, mode: str) -> None:
        """Demand writethrough, or leave the mode to the guest with writeback."""
        self.ask("set-cache", mode=mode)

    def quit(self) -> None:
        """End the daemon."""
        self.ask("quit")

    def stream(self, base: str | None = None, *, rate: int = 0, on_error: str = "report") -> Job:
        """Begin to pull what is above *base*, or all that is below, into the image."""
        return self._job("stream", **({} if base is None else {"base": base}), rate=rate, on_error=on_error)

    def commit(self, base: str | None = None, *, active: bool = False, rate: int = 0, on_error: str = "report") -> Job:
        """Begin to bring what is between the image and *base*, or, if that is one file, the lowest, into that.
        *active*: and what the image holds itself; *base* is its backing file then, if nothing is said.
        """
        options = {**({} if base is None else {"base": base}), **({"active": True} if active else {})}
        return self._job("commit", **options, rate=rate, on_error=on_error)

    def mirror(
        self,
        target: str,
        image_format: str | None = None,
        *,
        top: bool = False,
        existing: bool = False,
        rate: int = 0,
        on_error: str = "report",
    ) -> Job:
        """Begin to copy the disk to *target*, as seen from the image's directory, and to keep the two in step.

        An NBD URI, which can be left only, is *existing* and raw.
        *top*: the image alone, over the same backing file; *existing*: what *target* holds is overwritten.
        """
        options = {} if image_format is None else {"format": image_format}
        return self._job("mirror", target=target, **options, top=top, existing=existing, rate=rate, on_error=on_error)

    def backup(
        self,
        target: str,
        *,
        format: str | None = None,
        existing: bool = False,
        bitmap: str | None = None,
        bitmap_mode: str | None = None,
        backing: str | None = None,
        rate: int = 0,
        on_error: str = "report",
    ) -> Job:
        """Begin to copy the disk of this moment to *target*, or what *bitmap* says has changed, over *backing*.

        *target*: a file, or an NBD URI. *format*: qcow2 if not said, of an export raw.
        *bitmap_mode*: `never` lets the bitmap keep what was copied, `on-success`, if not said, forget it at the end.
        """
        words = {"format": format, "bitmap": bitmap, "bitmap-mode": bitmap_mode, "backing": backing}
        given = {key: word for key, word in words.items() if word is not None}
        return self._job("backup", target=target, existing=existing, rate=rate, on_error=on_error, **given)

    def jobs(self) -> list[Job]:
        """The one under way, and those that ended last."""
        return [_job_of(each) for each in self.ask("job-list")]

    def job(self, number: int) -> Job:
        """How it stands with one."""
        for job in self.jobs():
            if job.job == number:
                return job
        raise ControlError(f"there is no job {number}")

    def pause(self, number: int) -> Job:
        """Let a job move nothing until `resume`."""
        return self._job("job-pause", job=number)

    def resume(self, number: int) -> Job:
        """Let it go on."""
        return self._job("job-resume", job=number)

    def complete(self, number: int) -> Job:
        """Let a job that is ready finish: `wait` for it."""
        return self._job("job-complete", job=number)

    def cancel(self, number: int) -> Job:
        """Let it end at its next piece; a mirror that is ready leaves its copy whole."""
        return self._job("job-cancel", job=number)

    def set_rate(self, number: int, rate: int) -> Job:
        """Let it move at most *rate* bytes a second; 0: as many as it can."""
        return self._job("job-set-rate", job=number, rate=rate)

    def wait(self, number: int, progress: Callable[[Job], None] = lambda job: None) -> Job:
        """How a job ended, once it has, or how it stands once it is ready; *progress* is told meanwhile.

        Takes the events of that job; all others stay for `next_event`.
        """
        self.subscribe("job")
        while True:
            job = self.job(number)
            progress(job)
            if job.has_ended or job.state == "ready":
                return job
            deadline = monotonic() + STEP
            while not self._take_events_of(number) and self._receive_event(deadline):
                pass

    def subscribe(self, *names: EventName) -> None:
        """Have events of these names told from now on; none: all."""
        self.ask("subscribe", **({"events": list(names)} if names else {}))

    def next_event(self, seconds: float | None = None) -> Event | None:
        """The next event, which is waited for; None after so many *seconds* without one."""
        deadline = None if seconds is None else monotonic() + seconds
        while not self._events:
            if not self._receive_event(deadline):
                return None
        return self._events.popleft()

    def events(self) -> Iterator[Event]:
        """Each event that comes, until the daemon ends."""
        with suppress(DaemonEnded):
            while (event := self.next_event()) is not None:
                yield event

    def _receive_event(self, deadline: float | None) -> bool:
        """Whether a line has come before *deadline*."""
        with self._about_daemon():
            try:
                self._keep_event(self._line(deadline))
            except TimeoutError:
                return False
        return True

    def _take_events_of(self, job: int) -> bool:
        """Whether there were any."""
        others = [event for event in self._events if event.name != "job" or event.data["job"] != job]
        are_any = len(others) < len(self._events)
        self._events = deque(others)
        return are_any

    def _job(self, command: str, **arguments: Any) -> Job:
        return _job_of(self.ask(command, **arguments))

    def _keep_event(self, line: dict[str, Any]) -> bool:
        if "event" not in line:
            return False
        self._events.append(Event(line["event"], line.get("data")))
        return True

    def _line(self, deadline: float | None) -> dict[str, Any]:
        """Raises: TimeoutError, OSError; ValueError if it is none of ours."""
        while b"\n" not in self._received:
            if deadline is not None and deadline <= monotonic():
                raise TimeoutError
            self._socket.settimeout(None if deadline is None else max(deadline - monotonic(), 0.001))
            data = self._socket.recv(1 << 16)
            if not data and not self._received:
                raise EOFError
            if not data:
                raise ValueError("the daemon has ended within a line")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        answer = json.loads(line)
        if not isinstance(answer, dict):
            raise ValueError("not an object")
        return answer

    @contextmanager
    def _about_daemon(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise ControlError(f"{self.path}: {SILENT}") from None
        except (ConnectionResetError, BrokenPipeError, EOFError, ValueError, KeyError, TypeError) as error:
            kind = DaemonEnded if isinstance(error, EOFError) else ControlError
            raise kind(f"{self.path}: no daemon of ours answers there, or it ended before it answered") from None
        except OSError as error:
            raise ControlError(f"{self.path or repr(self.path)}: {error.strerror or error}") from None


def given(**options: Any) -> dict[str, Any]:
    """Those that say something: a daemon of an earlier version need not know the others."""
    return {name: value for name, value in options.items() if value}


def _export_of(said: dict[str, Any]) -> Export:
    return Export(said["export"], said["uri"], said["running"])


def _job_of(record: dict[str, Any]) -> Job:
    """What a daemon tells of a job; a later one may tell more."""
    known = {key.replace("-", "_"): value for key, value in record.items()}
    return Job(**{field: known[field] for field in Job.__dataclass_fields__ if field in known})
