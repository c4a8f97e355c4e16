"""What the thread of one job does: it begins the work, again after it had to make room, and says how it ended."""

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial

from qcow2 import ImageError
from qcow2.driver.task import Task
from qcow2.error import no_memory
from qcow2.job.pace import Cancelled
from qcow2.job.reins import Reins
from ring.thread import new_future
from vhost.device import Device, die
from vhost.disk import ImageBackend
from vhost.job import Job, JobFailed, Over, Room, RoomWanted
from vhost.policy import OnError, State, is_final
from vhost.problem import refusal_of

LOOK_SECONDS = 0.05  # between two looks of a job that a rate keeps waiting
NOTHING_LEFT = "it fell behind, or had to make room, before it could end: no copy is left"
RETRY_SECONDS = 1.0  # until a job that ignores errors is begun again


class JobThread:
    """Looks after *job*, as long as there is *room*; *on_end()* is told, under its lock, right before the job ends."""

    def __init__(self, job: Job, room: Room, device: Device, backend: ImageBackend, on_end: Callable[[], None]) -> None:
        self._job = job
        self._room = room
        self._changed = room.changed
        self._device = device
        self._backend = backend
        self._on_end = on_end

    def fall_behind(self) -> None:
        """What was done has to be done again. On any thread."""
        with self._changed:
            self._job.fall_behind()
            self._job.stir()

    def main(self) -> None:
        """All of it."""
        try:
            self._look_after()
            gc.collect()  # images that it closed are in cycles, which do not weigh what C has for them
        except RuntimeError as error:  # the worker has ended; the daemon does, or has died of something else
            with self._changed:
                self._on_end()
                self._job.turn(State.CANCELLED, str(error))
        except BaseException as error:  # a bug of ours: nobody would look after the jobs any more
            die(error)

    def _look_after(self) -> None:
        while (reins := self._await_room()) is not None:
            try:
                self._end(self._go(reins))
                return
            except (Cancelled, RoomWanted):
                self._stand_back()
            except JobFailed as failure:
                self._end(State.FAILED, str(failure))
                return
            except (OSError, ImageError, ValueError) as error:
                self._stand_back()
                if self._is_over(error):
                    return
        if not self._job.is_leaving:
            self._end(State.CANCELLED)
        elif problem := self._leave_late():
            self._end(State.FAILED, "; ".join(filter(None, [self._job.error, problem])))
        else:
            self._end(State.CANCELLED)

    def _leave_late(self) -> str:
        """Let one that is cancelled, and was to be begun again, leave what is whole all the same; -> why it cannot."""
        job = self._job
        if not job.work.is_whole:
            return NOTHING_LEFT
        with self._changed:
            job.is_finishing = True
        try:
            with _counting_memory():
                job.work.part()
        except RoomWanted:
            return NOTHING_LEFT
        except JobFailed as failure:
            return str(failure)
        except (OSError, ImageError, ValueError) as error:
            return refusal_of(error)
        with self._changed:
            job.has_left = True
        return ""

    def _stand_back(self) -> None:
        """The attempt is over, the job is not yet."""
        with self._changed:
            self._job.is_begun = self._job.is_ready = self._job.is_finishing = False

    def _await_room(self) -> Reins | None:
        """What it is begun with, once it may be or is lost; None if it was cancelled first."""
        job = self._job
        with self._changed:
            while not (job.is_cancelled or job.work.is_lost) and (job.is_paused or not self._room.is_there):
                job.turn(job.standing)
                self._changed.wait()
            if job.is_cancelled:
                return None
            job.reins = Reins(job.rate)
            job.is_begun = True
            job.turn(job.standing)
            return job.reins

    def _go(self, reins: Reins) -> State:
        """Do it -> how it has ended."""
        with self._changed:
            self._job.is_behind = False
        with _counting_memory():
            self._job.work.prepare()
        outcome: Future[BaseException | None] = new_future()
        outcome.add_done_callback(lambda _: self._notice())
        self._device.worker.post(partial(self._begin, reins, outcome))
        while not outcome.done():
            self._await_stirring(outcome)
            self._device.worker.post(partial(wake, self._job, self._device, self._backend))
        error = outcome.result()
        with _counting_memory():
            if error is None:
                return self._part() if self._job.work.awaits_word else self._finish()
            try:
                raise error
            finally:
                del error

    def _finish(self) -> State:
        self._await_leave()
        self._job.work.finish()
        return State.COMPLETED

    def _part(self) -> State:
        """Let it finish once it is told to, or end."""
        if self._await_word() and self._has_finished():
            return State.COMPLETED
        self._job.work.part()
        with self._changed:
            self._job.has_left = True
        return State.CANCELLED

    def _has_finished(self) -> bool:
        """Whether it could; else it is to end, as it was told to meanwhile. Raises: RoomWanted if not even that."""
        try:
            with _counting_memory():
                self._job.work.finish()
        except (OSError, ImageError, ValueError) as error:  # it is ready as before
            with self._changed:
                self._job.may_finish = False
                is_to_end = self._job.is_cancelled and not self._must_begin_again()
                if not is_to_end:
                    self._stand_back()
                self._job.turn(self._job.standing, refusal_of(error))
            if not is_to_end:
                raise RoomWanted from error
            return False
        return True

    def _must_begin_again(self) -> bool:
        return self._job.is_behind or not self._room.is_there

    def _await_word(self) -> bool:
        """Whether it is to finish, not to end.

        Raises: RoomWanted if it has to begin again first; Cancelled if it was before it was ready.
        """

        job = self._job

        def may_go_on() -> bool:
            return self._must_begin_again() or job.is_cancelled or (job.may_finish and not job.is_paused)

        with self._changed:
            if job.is_cancelled and not job.is_leaving:
                raise Cancelled
            if self._must_begin_again():
                raise RoomWanted
            job.is_ready = job.was_ready = True
            job.turn(job.standing)
            self._changed.wait_for(may_go_on)
            if self._must_begin_again():
                raise RoomWanted
            job.is_finishing = True
            return not job.is_cancelled

    def _await_leave(self) -> None:
        """All is moved; whoever paused it meanwhile finds it as it was. Raises: Cancelled."""
        with self._changed:
            self._changed.wait_for(lambda: not self._job.is_paused or self._job.is_cancelled)
            if self._job.is_cancelled:
                raise Cancelled
            self._job.is_finishing = True

    def _begin(self, reins: Reins, outcome: "Future[BaseException | None]") -> None:
        """On the worker."""
        if not self._room.is_there or not self._device.is_attached:
            outcome.set_result(RoomWanted())
            return
        try:
            coroutine = self._job.work.begin(reins)
        except (OSError, ImageError, ValueError, RoomWanted, MemoryError) as error:
            outcome.set_result(error)
            return
        self._backend.run(coroutine, lambda task: outcome.set_result(task.take_error()))

    def _notice(self) -> None:
        with self._changed:
            self._job.stir()

    def _await_stirring(self, outcome: "Future[BaseException | None]") -> None:
        job = self._job
        with self._changed:
            if not outcome.done():
                job.turn(job.standing)
            self._changed.wait_for(lambda: job.is_stirred, LOOK_SECONDS if job.rate else None)
            job.is_stirred = False

    def _is_over(self, error: Exception) -> bool:
        """What becomes of a job that *error* stopped."""
        text = refusal_of(error)
        if is_final(self._job.on_error, error):
            self._end(State.FAILED, text)
            return True
        with self._changed:
            if self._job.on_error is OnError.IGNORE:
                self._job.turn(self._job.standing, text)
                self._changed.wait_for(lambda: self._job.is_cancelled, RETRY_SECONDS)
            else:
                self._job.is_paused = True
                self._job.turn(State.PAUSED, text)
        return False

    def _end(self, state: State, error: str = "") -> None:
        try:
            with _counting_memory():
                self._job.work.leave()
        except (OSError, ImageError) as failure:  # of what it leaves behind: the guest has no part in that
            error = "; ".join(filter(None, [error, refusal_of(failure)]))
        with self._changed:
            self._on_end()
            self._job.work = Over(self._job.work)
            self._job.turn(state, error)


@contextmanager
def _counting_memory() -> Iterator[None]:
    """A job that finds no memory has failed as one that finds no disk space has: the guest has no part in that."""
    try:
        yield
    except MemoryError:
        raise no_memory() from None


def wake(job: Job, device: Device, backend: ImageBackend) -> None:
    """On the worker: let the work look again whether it may go on."""
    if device.is_attached:
        job.work.look()
        backend.run(job.reins.wake(), _raise_what_it_raised)


def _raise_what_it_raised(task: Task) -> None:
    error = task.take_error()
    if error is not None:
        raise error
