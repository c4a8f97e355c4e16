"""What the control socket may ask of jobs; documented in docs/control.md."""

from collections.abc import Callable
from typing import Any

from qcow2.driver.uri import is_nbd
from vhost.backup import Backup
from vhost.committing import Committing
from vhost.device import Device
from vhost.disk import ImageBackend
from vhost.held import HeldImage
from vhost.job import JobRefused, Report, Work
from vhost.jobs import Jobs
from vhost.mirroring import Mirroring
from vhost.policy import COPY_FORMATS, BitmapMode, OnError
from vhost.probe import Probe
from vhost.problem import describe
from vhost.servedchain import ServedChain
from vhost.streaming import Streaming

RATE_LIMIT = 1 << 63


class JobCommands:
    """Starts jobs on the image of *held*, which is under *device* as *backend*, and has them looked after."""

    def __init__(
        self,
        device: Device,
        backend: ImageBackend,
        held: HeldImage,
        jobs: Jobs,
        on_frozen: Callable[[str, str, str], object] = lambda name, failure, unstable: None,
    ) -> None:
        """*on_frozen(name, failure, unstable)* is told, on any thread, that a job has taken a snapshot.

        *failure*: what `Snapshots.take` returned; *unstable*: what it raised, as SnapshotUnstable.
        """
        self._served = ServedChain(device, backend, held)
        self._served.on_frozen = on_frozen
        self._probe = Probe()
        self._jobs = jobs

    def require_none(self) -> None:
        """Raises: JobRefused while a job is under way."""
        self._jobs.require_none()

    def stream(self, base: object = None, rate: object = 0, on_error: object = "report") -> dict[str, Any]:
        """Pull what is above *base* in the chain, or all that is below the image, into the image."""
        if not (base is None or (isinstance(base, str) and base)):
            raise JobRefused(f"{base!r} is not the name of a file")
        return self._start(lambda: Streaming(self._served, base), rate, on_error)

    def commit(
        self, base: object = None, active: object = False, rate: object = 0, on_error: object = "report"
    ) -> dict[str, Any]:
        """Bring what is between the image and *base*, or the lowest, into that; if *active*, its own, too."""
        if not isinstance(active, bool):
            raise JobRefused(f"active is true or false, not {active!r}")
        if not (base is None or (isinstance(base, str) and base)):
            raise JobRefused(f"{base!r} is not the name of a file")
        return self._start(lambda: Committing(self._served, base, is_active=active), rate, on_error)

    def mirror(
        self,
        target: object,
        format: object = None,
        top: object = False,
        existing: object = False,
        rate: object = 0,
        on_error: object = "report",
    ) -> dict[str, Any]:
        """Copy the disk to *target*, and keep the two in step."""
        if not (isinstance(target, str) and target):
            raise JobRefused(f"{target!r} is not the name of a file")
        if not (format is None or isinstance(format, str)):
            raise JobRefused(f"{format!r} is not the name of a format")
        if not isinstance(top, bool) or not isinstance(existing, bool):
            raise JobRefused("top and existing are true or false")
        only_top, is_existing = top, existing
        self._require_answer(target)
        return self._start(
            lambda: Mirroring(self._served, target, format, only_top=only_top, is_existing=is_existing), rate, on_error
        )

    def job_complete(self, job: object) -> dict[str, Any]:
        """Let one that is ready finish."""
        return self._told(self._jobs.complete, job)

    def backup(
        self,
        target: object,
        format: object = None,
        existing: object = False,
        bitmap: object = None,
        bitmap_mode: object = None,
        backing: object = None,
        rate: object = 0,
        on_error: object = "report",
    ) -> dict[str, Any]:
        """Copy the disk of this moment to *target*, or what *bitmap* says has changed, over *backing*."""
        name = _named(target)
        if name is None:
            raise JobRefused("None is not the name of a file")
        if not isinstance(existing, bool):
            raise JobRefused(f"existing is true or false, not {existing!r}")
        if format is not None and format not in COPY_FORMATS:
            raise JobRefused(f"{format!r} is none of {', '.join(COPY_FORMATS)}")
        if bitmap is None and backing is not None:
            raise JobRefused("a backing file is for what a bitmap says: all of the disk needs none")
        if bitmap is None and bitmap_mode is not None:
            raise JobRefused("bitmap-mode is for a backup by a bitmap")
        mode = _bitmap_mode(bitmap_mode)
        names = {"bitmap": _named(bitmap), "backing": _named(backing)}
        image_format, is_existing = _named(format), existing
        self._require_answer(name)
        if names["backing"] is not None:
            self._require_answer(name, names["backing"])
        return self._start(
            lambda: Backup(self._served, name, image_format, exists=is_existing, bitmap_mode=mode, **names),
            rate,
            on_error,
        )

    def _require_answer(self, *names: str) -> None:
        """Before the device is kept, which the guest's restart waits for; *names* as of a `Probe`."""
        if not is_nbd(names[0]):
            try:
                self._probe.require_answer(self._served.held.options.blk_file, *names)
            except OSError as error:
                raise JobRefused(describe(error)) from error

    def _start(self, work: Callable[[], Work], rate: object, on_error: object) -> dict[str, Any]:
        nbytes = _rate(rate)
        policy = _policy(on_error)
        return self._jobs.start(work, rate=nbytes, on_error=policy).as_json()

    def job_list(self) -> list[dict[str, Any]]:
        """The job under way, and those that ended last."""
        return [report.as_json() for report in self._jobs.reports()]

    def job_pause(self, job: object) -> dict[str, Any]:
        """Let it move nothing for now."""
        return self._told(self._jobs.pause, job)

    def job_resume(self, job: object) -> dict[str, Any]:
        """Let it go on."""
        return self._told(self._jobs.resume, job)

    def job_cancel(self, job: object) -> dict[str, Any]:
        """Let it end."""
        return self._told(self._jobs.cancel, job)

    def job_set_rate(self, job: object, rate: object) -> dict[str, Any]:
        """Let it move at most *rate* bytes a second."""
        return self._jobs.set_rate(_number(job), _rate(rate)).as_json()

    @staticmethod
    def _told(command: Callable[[int], Report], job: object) -> dict[str, Any]:
        return command(_number(job)).as_json()


def _named(name: object) -> Any:
    if not (name is None or (isinstance(name, str) and name and "\0" not in name)):
        raise JobRefused(f"{name!r} is no name")
    return name


def _number(job: object) -> int:
    if not isinstance(job, int) or isinstance(job, bool):
        raise JobRefused(f"{job!r} is not the number of a job")
    return job


def _rate(rate: object) -> int:
    if not isinstance(rate, int) or isinstance(rate, bool) or not 0 <= rate < RATE_LIMIT:
        raise JobRefused(f"{rate!r} is not a rate in bytes a second")
    return rate


def _bitmap_mode(mode: object) -> BitmapMode:
    if mode is None:
        return BitmapMode.ON_SUCCESS
    if not isinstance(mode, str) or mode not in tuple(BitmapMode):
        raise JobRefused(f"{mode!r} is none of {', '.join(BitmapMode)}")
    return BitmapMode(mode)


def _policy(on_error: object) -> OnError:
    if not isinstance(on_error, str) or on_error not in tuple(OnError):
        raise JobRefused(f"{on_error!r} is none of {', '.join(OnError)}")
    return OnError(on_error)
