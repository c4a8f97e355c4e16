"""Long work on the disk while a guest uses it: one job at a time, which a thread of its own looks after.

What a job does to the image is a coroutine on the disk's thread, where requests of the guest take their turns between
its steps. It holds nothing that cannot be given up: when all requests have to wait, or the image is let go, it is told
to make room, ends at its next piece, and is begun again once the disk goes on; what it has done stays.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from types import TracebackType

from qcow2 import ImageError
from qcow2.driver.task import Task
from qcow2.error import no_memory
from qcow2.job.pace import Cancelled
from qcow2.job.reins import Reins
from ring.thread import new_future, start_deaf
from vhost.device import Device, die
from vhost.disk import ImageBackend
from vhost.job import ENDED, Job, JobFailed, JobRefused, Report, RoomWanted, State, Work
from vhost.policy import OnError, is_final
from vhost.problem import describe

REMEMBERED = 32  # jobs that have ended
LOOK_SECONDS = 0.05  # between two looks of a job that a rate keeps waiting
RETRY_SECONDS = 1.0  # until a job that ignores errors is begun again


class Jobs:
    """The jobs of one disk. A context manager: leaving it cancels what is under way and waits for its end.

    *tell(report)* comes at each change of a job's state, on any thread.
    """

    def __init__(self, device: Device, backend: ImageBackend, tell: Callable[[Report], None]) -> None:
        self._device = device
        self._backend = backend
        self._tell = tell
        self._changed = threading.Condition()  # guards all of this; nobody waits for the worker under it
        self._jobs: dict[int, Job] = {}
        self._current: Job | None = None
        self._thread: threading.Thread | None = None
        self._last = 0
        self._has_room = device.is_attached
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
                self._cancel(self._current)
            thread = self._thread
        if thread is not None:
            thread.join()

    def start(self, begin: Callable[[], Work], *, rate: int, on_error: OnError) -> Report:
        """Do the work that *begin()* makes while nobody lets the image go. Raises: JobRefused."""
        self.require_none()
        try:
            with self._device.keeping():
                work = begin()
        except RoomWanted:
            raise JobRefused("the image is not held: no front-end uses it") from None
        except (OSError, ImageError, ValueError) as error:
            raise JobRefused(_said(error)) from error
        try:
            return self._admit(work, rate, on_error)
        except JobRefused:
            work.leave()
            raise

    def _admit(self, work: Work, rate: int, on_error: OnError) -> Report:
        with self._changed:
            if self._is_ending:
                raise JobRefused("the daemon is ending")
            job = Job(self._last + 1, work, rate, on_error)
            work.on_behind = lambda: self._fall_behind(job)
            thread = threading.Thread(target=self._main, args=(job,), name=f"job {job.number}", daemon=True)
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
            self._turn(job, job.standing)
            return job.report()

    def resume(self, number: int) -> Report:
        """Let it go on. Raises: JobRefused if it has ended."""
        with self._changed:
            job = self._find_going(number)
            job.is_paused = job.reins.is_held = False
            self._turn(job, job.standing)
            self._stir(job)
            return job.report()

    def complete(self, number: int) -> Report:
        """Let one that is ready finish. Raises: JobRefused if it is not, or may not."""
        with self._changed:
            work = self._find_ready(number).work
        try:
            work.require_finishable()  # which may take as long as a host takes
        except (OSError, ImageError, ValueError) as error:
            raise JobRefused(_said(error)) from error
        with self._changed:
            job = self._find_ready(number)
            job.may_finish = True
            self._turn(job, job.standing)
            self._stir(job)
            return job.report()

    def set_rate(self, number: int, rate: int) -> Report:
        """Let it move at most *rate* bytes a second; 0: as many as it can. Raises: JobRefused if it has ended."""
        with self._changed:
            job = self._find_going(number)
            job.rate = rate
            job.reins.set_rate(rate)
            self._stir(job)
            return job.report()

    def cancel(self, number: int) -> Report:
        """Let it end at its next piece; what it has done stays. Raises: JobRefused if it has ended otherwise."""
        with self._changed:
            job = self._find(number)
            if job.state in (State.COMPLETED, State.FAILED):
                raise JobRefused(f"job {number} has ended: {job.state}")
            self._cancel(job)
            return job.report()

    # with the lock

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
        if job.is_ready:  # it ends soon, and is not to be waited for as it is
            self._turn(job, job.standing)
        self._stir(job)

    def _fall_behind(self, job: Job) -> None:
        """On any thread."""
        with self._changed:
            job.is_behind = True
            self._stir(job)

    def _stir(self, job: Job) -> None:
        job.is_stirred = True
        self._changed.notify_all()

    def _turn(self, job: Job, state: State, error: str = "") -> None:
        if (state, error or job.error) != (job.state, job.error):
            job.state, job.error = state, error or job.error
            self._tell(job.report())

    # on the worker

    def _make_room(self) -> None:
        """All that is under way will be awaited: let it be little."""
        with self._changed:
            self._has_room = False
            self._changed.notify_all()  # one that is ready is not any more
            job = self._current
        if job is not None:
            job.reins.cancel()
            self._wake(job, job.reins)

    def _give_room(self) -> None:
        with self._changed:
            self._has_room = True
            self._changed.notify_all()

    def _wake(self, job: Job, reins: Reins) -> None:
        if self._device.is_attached:
            job.work.look()
            self._backend.run(reins.wake(), _raise_what_it_raised)

    # on the job's thread

    def _main(self, job: Job) -> None:
        try:
            self._look_after(job)
        except RuntimeError as error:  # the worker has ended; the daemon does, or has died of something else
            with self._changed:
                self._current = None
                self._turn(job, State.CANCELLED, str(error))
        except BaseException as error:  # a bug of ours: nobody would look after the jobs any more
            die(error)

    def _look_after(self, job: Job) -> None:
        while (reins := self._await_room(job)) is not None:
            try:
                self._end(job, self._go(job, reins))
                return
            except (Cancelled, RoomWanted):
                self._stand_back(job)
            except JobFailed as failure:
                self._end(job, State.FAILED, str(failure))
                return
            except (OSError, ImageError, ValueError) as error:
                self._stand_back(job)
                if self._is_over(job, error):
                    return
        self._end(job, State.CANCELLED)

    def _stand_back(self, job: Job) -> None:
        """The attempt is over, the job is not yet."""
        with self._changed:
            job.is_begun = job.is_ready = job.is_finishing = False

    def _await_room(self, job: Job) -> Reins | None:
        """What it is begun with, once it may be; None if it was cancelled first."""
        with self._changed:
            while not job.is_cancelled and (job.is_paused or not self._has_room):
                self._turn(job, job.standing)
                self._changed.wait()
            if job.is_cancelled:
                return None
            job.reins = Reins(job.rate)
            job.is_begun = True
            self._turn(job, job.standing)
            return job.reins

    def _go(self, job: Job, reins: Reins) -> State:
        """Do it -> how it has ended."""
        with self._changed:
            job.is_behind = False
        job.work.prepare()
        outcome: Future[BaseException | None] = new_future()
        outcome.add_done_callback(lambda _: self._notice(job))
        self._device.worker.post(partial(self._begin, job, reins, outcome))
        while not outcome.done():
            self._await_stirring(job, outcome)
            self._device.worker.post(partial(self._wake, job, reins))
        error = outcome.result()
        if error is None:
            return self._part(job) if job.work.awaits_word else self._finish(job)
        try:
            raise no_memory() if isinstance(error, MemoryError) else error
        finally:
            del error

    def _finish(self, job: Job) -> State:
        self._await_leave(job)
        job.work.finish()
        return State.COMPLETED

    def _part(self, job: Job) -> State:
        """Let it finish once it is told to, or end."""
        if not self._await_word(job):
            job.work.part()
            return State.CANCELLED
        try:
            job.work.finish()
        except (OSError, ImageError, ValueError) as error:  # it is ready as before
            with self._changed:
                job.may_finish = False
                job.error = _said(error)
            raise RoomWanted from error
        return State.COMPLETED

    def _await_word(self, job: Job) -> bool:
        """Whether it is to finish, not to end. Raises: RoomWanted if it has to begin again first."""

        def must_begin_again() -> bool:
            return job.is_behind or not self._has_room

        with self._changed:
            job.is_ready = True
            self._turn(job, job.standing)
            self._changed.wait_for(
                lambda: must_begin_again() or job.is_cancelled or (job.may_finish and not job.is_paused)
            )
            if must_begin_again():
                raise RoomWanted
            job.is_finishing = True
            return not job.is_cancelled

    def _await_leave(self, job: Job) -> None:
        """All is moved; whoever paused it meanwhile finds it as it was. Raises: Cancelled."""
        with self._changed:
            self._changed.wait_for(lambda: not job.is_paused or job.is_cancelled)
            if job.is_cancelled:
                raise Cancelled
            job.is_finishing = True

    def _begin(self, job: Job, reins: Reins, outcome: "Future[BaseException | None]") -> None:
        """On the worker."""
        if not self._has_room or not self._device.is_attached:
            outcome.set_result(RoomWanted())
            return
        try:
            coroutine = job.work.begin(reins)
        except (OSError, ImageError, ValueError, RoomWanted) as error:
            outcome.set_result(error)
            return
        self._backend.run(coroutine, lambda task: outcome.set_result(task.take_error()))

    def _notice(self, job: Job) -> None:
        with self._changed:
            self._stir(job)

    def _await_stirring(self, job: Job, outcome: "Future[BaseException | None]") -> None:
        with self._changed:
            if not outcome.done():
                self._turn(job, job.standing)
            self._changed.wait_for(lambda: job.is_stirred, LOOK_SECONDS if job.rate else job.work.look_seconds)
            job.is_stirred = False

    def _is_over(self, job: Job, error: Exception) -> bool:
        """What becomes of a job that *error* stopped."""
        text = _said(error)
        if is_final(job.on_error, error):
            self._end(job, State.FAILED, text)
            return True
        with self._changed:
            if job.on_error is OnError.IGNORE:
                job.error = text
                self._changed.wait_for(lambda: job.is_cancelled, RETRY_SECONDS)
            else:
                job.is_paused = True
                self._turn(job, State.PAUSED, text)
        return False

    def _end(self, job: Job, state: State, error: str = "") -> None:
        try:
            job.work.leave()
        except (OSError, ImageError) as failure:  # of what it leaves behind: the guest has no part in that
            error = "; ".join(filter(None, [error, describe(failure)]))
        with self._changed:
            self._current = None
            self._turn(job, state, error)


def _said(error: Exception) -> str:
    return describe(error) if isinstance(error, OSError | ImageError) else str(error)


def _raise_what_it_raised(task: Task) -> None:
    error = task.take_error()
    if error is not None:
        raise error
