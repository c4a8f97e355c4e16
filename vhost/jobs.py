"""Long work on the disk while a guest uses it: one job at a time, which a thread of its own looks after.

What a job does to the image is a coroutine on the disk's thread, where requests of the guest take their turns between
its steps. It holds nothing that cannot be given up: when all requests have to wait, or the image is let go, it is told
to make room, ends at its next piece, and is begun again once the disk goes on; what it has done stays.
"""

import logging
import threading
from collections.abc import Callable
from types import TracebackType

from qcow2 import ImageError
from ring.thread import start_deaf
from vhost.device import Device
from vhost.disk import ImageBackend
from vhost.job import Job, JobRefused, Report, Room, RoomWanted, Work
from vhost.jobthread import JobThread, wake
from vhost.policy import ENDED, OnError, State
from vhost.problem import refusal_of

log = logging.getLogger("vhost")

REMEMBERED = 32  # jobs that have ended
PATIENCE_SECONDS = 30.0  # of a daemon that ends with a job: its disk is to be closed, too, before somebody kills it


class Jobs:
    """The jobs of one disk. A context manager: leaving it cancels what is under way and waits a while for its end.

    *tell(report)* comes at each change of a job's state, on any thread.
    """

    def __init__(self, device: Device, backend: ImageBackend, tell: Callable[[Report], None]) -> None:
        self._device = device
        self._backend = backend
        self._tell = tell
        self._room = Room(is_there=device.is_attached)
        self._changed = self._room.changed
        self._jobs: dict[int, Job] = {}
        self._current: Job | None = None
        self._thread: threading.Thread | None = None
        self._last = 0
        self._is_ending = False
        device.on_alone, device.on_shared = self._make_room, self._give_room

    def __enter__(self) -> "Jobs":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._is_ending = True
            if self._current is not None:
                log.warning("job %d, %s, ends with the daemon", self._current.number, self._current.work.kind)
                self._cancel(self._current)
            thread = self._thread
        if thread is not None:
            thread.join(PATIENCE_SECONDS)
            if thread.is_alive():
                log.error(
                    "%s has not ended within %g s, and is left: does its target hang?", thread.name, PATIENCE_SECONDS
                )

    def start(self, begin: Callable[[], Work], *, rate: int, on_error: OnError) -> Report:
        """Do the work that *begin()* makes while nobody lets the image go. Raises: JobRefused."""
        self.require_none()
        try:
            with self._device.keeping():
                work = begin()
        except RoomWanted:
            raise JobRefused("the image is not held: no front-end uses it") from None
        except (OSError, ImageError, ValueError) as error:
            raise JobRefused(refusal_of(error)) from error
        try:
            return self._admit(work, rate, on_error)
        except JobRefused:
            work.leave()
            raise

    def _admit(self, work: Work, rate: int, on_error: OnError) -> Report:
        with self._changed:
            if self._is_ending:
                raise JobRefused("the daemon is ending")
            job = Job(self._last + 1, work, rate, on_error, self._room, self._tell)
            look_after = JobThread(job, self._room, self._device, self._backend, self._forget_current)
            work.on_behind = look_after.fall_behind
            thread = threading.Thread(target=look_after.main, name=f"job {job.number}", daemon=True)
            try:
                start_deaf(thread)
            except OSError as error:
                raise JobRefused(error.strerror) from error
            self._thread = thread
            self._last = job.number
            self._current = self._jobs[job.number] = job
            for number in list(self._jobs)[:-REMEMBERED]:
                del self._jobs[number]
            return job.report()

    def require_none(self) -> None:
        """Raises: JobRefused while one is under way."""
        with self._changed:
            if self._current is not None:
                job = self._current
                raise JobRefused(f"job {job.number} is under way: {job.work.kind}")

    def reports(self) -> list[Report]:
        """Of those under way and those that ended last, oldest first."""
        with self._changed:
            return [job.report() for job in self._jobs.values()]

    def report(self, number: int) -> Report:
        """Raises: JobRefused if there is no such job."""
        with self._changed:
            return self._find(number).report()

    def pause(self, number: int) -> Report:
        """Let it move nothing, nor finish, until `resume`. Raises: JobRefused if it has ended."""
        with self._changed:
            job = self._find_going(number)
            job.is_paused = job.reins.is_held = True
            job.turn(job.standing)
            return job.report()

    def resume(self, number: int) -> Report:
        """Let it go on. Raises: JobRefused if it has ended."""
        with self._changed:
            job = self._find_going(number)
            job.is_paused = job.reins.is_held = False
            job.turn(job.standing)
            job.stir()
            return job.report()

    def complete(self, number: int) -> Report:
        """Let one that is ready finish. Raises: JobRefused if it is not, or may not."""
        with self._changed:
            work = self._find_ready(number).work
        try:
            work.require_finishable()  # which may take as long as a host takes
        except (OSError, ImageError, ValueError) as error:
            raise JobRefused(refusal_of(error)) from error
        with self._changed:
            job = self._find_ready(number)
            job.may_finish = True
            job.turn(job.standing)
            job.stir()
            return job.report()

    def set_rate(self, number: int, rate: int) -> Report:
        """Let it move at most *rate* bytes a second; 0: as many as it can. Raises: JobRefused if it has ended."""
        with self._changed:
            job = self._find_going(number)
            job.rate = rate
            job.reins.set_rate(rate)
            job.stir()
            return job.report()

    def cancel(self, number: int) -> Report:
        """Let it end at its next piece; what it has done stays. Raises: JobRefused if it has ended otherwise."""
        with self._changed:
            job = self._find(number)
            if job.state in (State.COMPLETED, State.FAILED):
                raise JobRefused(f"job {number} has ended: {job.state}")
            if job.state not in ENDED:
                self._cancel(job)
            return job.report()

    # with the lock

    def _forget_current(self) -> None:
        """It ends."""
        self._current = None

    def _find(self, number: int) -> Job:
        if number not in self._jobs:
            raise JobRefused(f"there is no job {number}")
        return self._jobs[number]

    def _find_going(self, number: int) -> Job:
        job = self._find(number)
        if job.state in ENDED:
            raise JobRefused(f"job {number} has ended: {job.state}")
        return job

    def _find_ready(self, number: int) -> Job:
        job = self._find_going(number)
        if job.state is not State.READY and not job.may_finish:
            raise JobRefused(f"job {number} is {job.state}, not ready")
        return job

    def _cancel(self, job: Job) -> None:
        job.is_cancelled = True
        job.reins.cancel()
        job.is_leaving |= job.was_ready
        if job.is_ready:  # it ends soon, and is not to be waited for as it is
            job.turn(job.standing)
        else:
            job.work.abort()
        job.stir()

    # on the worker

    def _make_room(self) -> None:
        """All that is under way will be awaited: let it be little."""
        with self._changed:
            self._room.is_there = False
            self._changed.notify_all()  # one that is ready is not any more
            job = self._current
            if job is not None:
                job.fall_behind()
        if job is not None:
            job.reins.cancel()
            wake(job, self._device, self._backend)

    def _give_room(self) -> None:
        with self._changed:
            self._room.is_there = True
            self._changed.notify_all()
