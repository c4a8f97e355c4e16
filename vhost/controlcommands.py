"""What the control socket may ask of a running daemon; documented in docs/control.md.

Everything here runs on the commander, one after the other, but for AT_ONCE, which take no lock that anybody waits in.
It reaches the data plane as the control thread does, through `Worker.call`, and never waits for the control thread: a
vhost-user message in progress cannot hold it up, nor it one.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

from ring.statistics import Histogram
from vhost.device import Device, ResizeRefused
from vhost.event import Event
from vhost.exports import ExportRefused, Exports
from vhost.imagecommands import ImageCommands, ImageRefused
from vhost.job import JobRefused
from vhost.jobcommands import JobCommands
from vhost.metrics import open_metrics
from vhost.overlaybitmaps import OverlayBitmaps
from vhost.overlaywish import OverlayWish
from vhost.snapshot import Pace, SnapshotRefused, SnapshotUnstable
from vhost.together import Steps

VERSION = 1
SIZE_LIMIT = 1 << 63


TakeSnapshot = Callable[[str, Pace, OverlayWish], str]


class CommandError(Exception):
    """The command cannot be done; one line says why."""


class Commands:
    """The commands of one daemon: *describe()* is what it says of its image, *stop_fd* ends it.

    *take_snapshot* is `Snapshots.take`.
    """

    def __init__(
        self,
        device: Device,
        stop_fd: int,
        describe: Callable[[], dict[str, Any]],
        take_snapshot: TakeSnapshot,
        jobs: JobCommands,
        exports: Exports,
        image: ImageCommands,
    ) -> None:
        self._device = device
        self._steps: Steps | None = None  # of a snapshot that is under way
        self._leader: object = None  # who says when they are taken
        self._take_snapshot = take_snapshot
        self._stop_fd = stop_fd
        self._describe = describe
        self.jobs = jobs
        self.exports = exports
        self.image = image
        self.on_event: Callable[[Event], None] = lambda event: None

    def run(self, request: dict[str, Any], client: object) -> Any:
        """Do what *request* of *client* asks for and return the result. Raises: CommandError."""
        name, arguments = request.get("command"), {key: request[key] for key in request if key not in ("command", "id")}
        command = COMMANDS.get(name) if isinstance(name, str) else None
        if command is None:
            raise CommandError(f"unknown command {name!r}, known are {', '.join(COMMANDS)}")
        wanted, options = ARGUMENTS.get(str(name), ()), OPTIONS.get(str(name), ())
        if set(arguments) - set(options) != set(wanted):
            also = f" and perhaps {', '.join(options)}" if options else ""
            raise CommandError(f"{name} takes {' and '.join(wanted) or 'no arguments'}{also}")
        for word in _words(arguments):
            _require_name(word)
        given = {key.replace("-", "_"): value for key, value in arguments.items()}
        try:
            return command(self, **given) if name in AT_ONCE else self._run_in_turn(name, command, client, given)
        except (JobRefused, ExportRefused, ImageRefused, SnapshotRefused, SnapshotUnstable) as refusal:
            raise CommandError(str(refusal)) from refusal
        except RuntimeError:
            raise CommandError("the daemon is ending") from None

    def _run_in_turn(self, name: Any, command: Callable[..., Any], client: object, given: dict[str, Any]) -> Any:
        """On the commander, where the steps are. Raises: what *command* raises, CommandError."""
        if self._steps is not None and self._steps.is_over and name not in STEPS:  # nobody let it go on
            self._steps = None
        if name in STEPS and (self._steps is None or client is not self._leader):
            raise CommandError("no snapshot of this client is under way")
        if name not in STEPS and self._steps is not None:
            raise CommandError("a snapshot of several disks is under way")
        self._leader = client if name == "snapshot-begin" else self._leader
        try:
            return command(self, **given)
        finally:
            if self._steps is not None and self._steps.is_over:
                self._steps = None

    def leave(self, client: object) -> None:
        """*client* is gone: the snapshot that it led is called off."""
        if self._steps is not None and client is self._leader:
            self.snapshot_cancel()

    def status(self) -> dict[str, Any]:
        """What is served, how, and to whom."""
        device = self._device
        session = device.session
        return {
            **self._describe(),
            "size": device.backend.properties.size,
            "aio": device.worker.aio.value,
            "cache": "writethrough" if device.block.writethrough else "writeback",
            "forced-writethrough": device.block.is_forced,
            "image-held": device.is_attached,
            "connected": session is not None,
            "features": session and f"{session.features:#x}",
            "protocol-features": session and f"{session.protocol_features:#x}",
            "running": session is not None and session.vrings.are_running,
            "num-queues": device.offer.num_queues,
        }

    def stats(self) -> dict[str, Any]:
        """Every counter, and the latencies."""
        statistics = self._device.worker.statistics
        return {
            "counters": vars(self._device.worker.counters),
            "stages": {name: _as_json(getattr(statistics, name)) for name in ("data", "metadata", "sync")},
            "queues": {
                str(index): {
                    "requests": queue.requests,
                    "wait": _as_json(queue.wait),
                    "service": _as_json(queue.service),
                }
                for index, queue in statistics.queues.items()
            },
        }

    def metrics(self) -> str:
        """The same as OpenMetrics text."""
        return open_metrics(self._device.worker.counters, self._device.worker.statistics)

    def resize(self, size: object) -> dict[str, Any]:
        """Let the disk grow to *size* bytes."""
        if not isinstance(size, int) or isinstance(size, bool) or not 0 < size < SIZE_LIMIT:
            raise CommandError(f"{size!r} is not a size in bytes")
        try:
            self._device.resize(size)
        except ResizeRefused as refusal:
            raise CommandError(str(refusal)) from refusal
        return {"size": self._device.backend.properties.size}

    def snapshot(self, name: object, **wish: object) -> dict[str, Any] | None:
        """Freeze what the disk holds as the file *name*; what is served becomes an overlay of it."""
        if not isinstance(name, str):
            raise CommandError(f"{name!r} is not the name of a file")
        wanted = _overlay_wish(**wish)
        self.jobs.require_none()
        return self._telling_of(name, lambda: self._take_snapshot(name, Pace(), wanted))

    def snapshot_begin(self, name: object, **wish: object) -> None:
        """The same, one step after the other, with other disks at one instant: make the overlay."""
        if not isinstance(name, str):
            raise CommandError(f"{name!r} is not the name of a file")
        wanted = _overlay_wish(**wish)
        self.jobs.require_none()
        self._steps = Steps(lambda name, pace: self._take_snapshot(name, pace, wanted), name, self._stop_fd)
        self._steps.begin()

    def snapshot_next(self) -> dict[str, Any] | None:
        """Let requests wait; then let the overlay have its name; then go on, and say what was done."""
        assert self._steps is not None
        return self._telling_of(self._steps.name, self._steps.go_on)

    def snapshot_cancel(self) -> None:
        """Let the disk go on as it was."""
        assert self._steps is not None
        self._steps.call_off()
        self._steps = None

    def _telling_of(self, name: str, take: Callable[[], str | None]) -> dict[str, Any] | None:
        """*take* the snapshot *name*, or go on with it, and tell of it once it is taken, stable or not."""
        try:
            failure = take()
        except SnapshotUnstable as unstable:
            self.tell_of_snapshot(name, unstable=str(unstable))
            raise
        return None if failure is None else self.tell_of_snapshot(name, failure)

    def tell_of_snapshot(self, name: str, failure: str = "", unstable: str = "") -> dict[str, Any]:
        """What is said of the snapshot *name*, which is taken; for any thread."""
        said = {"not-closed-cleanly": failure, "unstable": unstable}
        taken = {"snapshot": name, **{key: why for key, why in said.items() if why}}
        self.on_event(Event("snapshot", taken))
        return taken

    def snapshot_internal(self, action: str, name: object) -> Any:
        """Create, delete or apply the internal snapshot *name*."""
        result = INTERNAL[action](self.image, name)
        self.on_event(Event("snapshot-internal", {"action": action, "name": name}))
        return result

    def bitmap_change(self, actions: object) -> None:
        """Do these one after the other, all of them or none."""
        self.image.bitmap_change(actions)
        self.on_event(Event("bitmap", {"actions": actions}))

    def flush(self) -> None:
        """Make every write completed before now stable."""
        if (result := self._device.flush_now()) < 0:
            raise CommandError(os.strerror(-result))

    def set_cache(self, mode: object) -> None:
        """`writethrough` makes every write stable whatever the guest chose; `writeback` leaves it to the guest."""
        if mode not in ("writeback", "writethrough"):
            raise CommandError(f"{mode!r} is neither writeback nor writethrough")
        self._device.force_writethrough(mode == "writethrough")
        if mode == "writethrough":
            self.flush()

    def quit(self) -> None:
        """End as SIGTERM does."""
        os.eventfd_write(self._stop_fd, 1)


INTERNAL: dict[str, Callable[[ImageCommands, object], Any]] = {
    "create": ImageCommands.snapshot_internal_create,
    "delete": ImageCommands.snapshot_internal_delete,
    "apply": ImageCommands.snapshot_internal_apply,
}
COMMANDS: dict[str, Callable[..., Any]] = {
    "status": Commands.status,
    "stats": Commands.stats,
    "metrics": Commands.metrics,
    "resize": Commands.resize,
    "snapshot": Commands.snapshot,
    "snapshot-begin": Commands.snapshot_begin,
    "snapshot-next": Commands.snapshot_next,
    "snapshot-cancel": Commands.snapshot_cancel,
    "snapshot-internal-list": lambda commands: commands.image.snapshot_internal_list(),
    "snapshot-internal-create": lambda commands, name: commands.snapshot_internal("create", name),
    "snapshot-internal-delete": lambda commands, name: commands.snapshot_internal("delete", name),
    "snapshot-internal-apply": lambda commands, name: commands.snapshot_internal("apply", name),
    "bitmap-list": lambda commands: commands.image.bitmap_list(),
    "bitmap-change": Commands.bitmap_change,
    "export-start": lambda commands, **options: commands.exports.start(**options),
    "export-stop": lambda commands, file: commands.exports.stop(file),
    "export-list": lambda commands: commands.exports.list(),
    "stream": lambda commands, **options: commands.jobs.stream(**options),
    "commit": lambda commands, **options: commands.jobs.commit(**options),
    "backup": lambda commands, **options: commands.jobs.backup(**options),
    "mirror": lambda commands, **options: commands.jobs.mirror(**options),
    "job-list": lambda commands: commands.jobs.job_list(),
    "job-pause": lambda commands, job: commands.jobs.job_pause(job),
    "job-resume": lambda commands, job: commands.jobs.job_resume(job),
    "job-complete": lambda commands, job: commands.jobs.job_complete(job),
    "job-cancel": lambda commands, job: commands.jobs.job_cancel(job),
    "job-set-rate": lambda commands, job, rate: commands.jobs.job_set_rate(job, rate),
    "flush": Commands.flush,
    "set-cache": Commands.set_cache,
    "quit": Commands.quit,
}
ARGUMENTS = {
    "resize": ("size",),
    "snapshot": ("name",),
    "snapshot-begin": ("name",),
    "snapshot-internal-create": ("name",),
    "snapshot-internal-delete": ("name",),
    "snapshot-internal-apply": ("name",),
    "bitmap-change": ("actions",),
    "export-start": ("file",),
    "export-stop": ("file",),
    "backup": ("target",),
    "set-cache": ("mode",),
    "mirror": ("target",),
    "job-complete": ("job",),
    "job-pause": ("job",),
    "job-resume": ("job",),
    "job-cancel": ("job",),
    "job-set-rate": ("job", "rate"),
}
OPTIONS = {  # which may be left out
    "snapshot": ("bitmap-add", "carry-bitmaps", "options"),
    "snapshot-begin": ("bitmap-add", "carry-bitmaps", "options"),
    "export-start": ("socket", "address", "port", "bitmaps", "certificates", "no-tls"),
    "stream": ("base", "rate", "on-error"),
    "commit": ("base", "active", "rate", "on-error"),
    "mirror": ("format", "top", "existing", "rate", "on-error"),
    "backup": ("format", "existing", "bitmap", "bitmap-mode", "backing", "rate", "on-error"),
}

AT_ONCE = (  # for any thread: they wait for nobody
    "status",
    "stats",
    "metrics",
    "export-list",
    "job-list",
    "job-pause",
    "job-resume",
    "job-cancel",
    "job-set-rate",
)
STEPS = ("snapshot-next", "snapshot-cancel")


def _words(value: object) -> Iterator[str]:
    """Every string in a value of JSON, however deep."""
    waiting = [value]
    while waiting:
        match waiting.pop():
            case str(word):
                yield word
            case list(values):
                waiting += values
            case dict(members):
                waiting += [*members, *members.values()]


def _require_name(word: str) -> None:
    """JSON can say what no file, bitmap or option of a program can be called. Raises: CommandError."""
    try:
        sayable = b"\0" not in os.fsencode(word)
    except UnicodeEncodeError:
        sayable = False
    if not sayable:
        raise CommandError(f"{word!r} holds what no name can")


def _overlay_wish(bitmap_add: object = (), carry_bitmaps: object = False, options: object = None) -> OverlayWish:
    """Raises: CommandError."""
    if not isinstance(bitmap_add, list | tuple) or not all(isinstance(name, str) for name in bitmap_add):
        raise CommandError(f"{bitmap_add!r} is not a list of names of bitmaps")
    if not isinstance(carry_bitmaps, bool):
        raise CommandError(f"carry-bitmaps is true or false, not {carry_bitmaps!r}")
    given = {} if options is None else options
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        raise CommandError(f"{options!r} is not an object of options, each a string")
    try:
        return OverlayWish(OverlayBitmaps(tuple(bitmap_add), carry_bitmaps), given)
    except ValueError as error:
        raise CommandError(str(error)) from error


def _as_json(histogram: Histogram) -> dict[str, Any]:
    """Only what is not zero, keyed by the upper bound in ns."""
    buckets = {str(1 << i): count for i, count in enumerate(histogram.buckets) if count}
    return {"count": histogram.count, "nanoseconds": histogram.nanoseconds, "buckets": buckets}
