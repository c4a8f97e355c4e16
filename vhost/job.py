"""One job: what it does, how it stands with it, and what is told of that."""

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass
from typing import Any

from qcow2.job.reins import Reins
from vhost.policy import ENDED, OnError, State

log = logging.getLogger("vhost.job")  # whose errors are no events of their own


class JobRefused(Exception):
    """Nothing was begun or changed; one line says why."""


class JobFailed(Exception):
    """The job cannot go on, whatever its policy is; one line says why."""


class RoomWanted(Exception):
    """The disk is not held any more, or was asked for by others: the job is begun again later."""


class Work(ABC):
    """What a job does."""

    kind: str
    about: dict[str, Any]  # what was asked for
    awaits_word: bool = False  # once it is done with the disk, until it is told to finish or to end
    # to be told, on any thread, when it is not done with the disk any more, or lost
    on_behind: Callable[[], None] = staticmethod(lambda: None)

    def prepare(self) -> None:  # noqa: B027, most need nothing
        """What comes before it is begun, each time, on the job's thread.

        Raises: OSError, ImageError, ValueError, RoomWanted, JobFailed.
        """

    @abstractmethod
    def begin(self, reins: Reins) -> Coroutine[Any, Any, None]:
        """The work on the disk, on its thread while the image is held; done again, it goes on where it was.

        Raises: OSError, ImageError, ValueError, RoomWanted.
        """

    @abstractmethod
    def finish(self) -> None:
        """What is left once that has ended, on the job's thread; nothing has begun if it raises.

        Raises: OSError, ImageError, ValueError, RoomWanted, JobFailed.
        """

    @property
    def is_lost(self) -> bool:
        """For any thread: whether it can only fail, and `prepare` says why, however long it waits for the disk."""
        return False

    def look(self) -> None:  # noqa: B027
        """On the disk's thread while it is under way: its reins were changed."""

    def require_finishable(self) -> None:  # noqa: B027
        """Whether one that awaits word may be told to finish. Raises: OSError, ImageError, ValueError."""

    def part(self) -> None:  # noqa: B027
        """What is left where one that awaits word is told to end instead, on the job's thread. Raises: as `finish`."""

    @property
    def is_whole(self) -> bool:
        """On the job's thread: whether it may `part`, though it was to be begun again: nothing would be moved."""
        return False

    def abort(self) -> None:  # noqa: B027
        """On any thread: it is cancelled. Let it wait for no other host from now on; does not wait itself."""

    def leave(self) -> None:  # noqa: B027
        """What is left where the job has ended, finished or not, on its thread."""


class Over(Work):
    """What is remembered of *work*, which has ended: not the images that it had."""

    def __init__(self, work: Work) -> None:
        self.kind, self.about = work.kind, work.about

    def begin(self, reins: Reins) -> Coroutine[Any, Any, None]:
        """Never asked for."""
        raise AssertionError("it has ended")

    def finish(self) -> None:
        """Never asked for."""
        raise AssertionError("it has ended")


class Room:
    """Whether jobs may be at the disk, and the lock of all that is known of them: nobody waits for the worker in it."""

    def __init__(self, *, is_there: bool) -> None:
        self.is_there = is_there
        self.changed = threading.Condition()


@dataclass(frozen=True, slots=True)
class Report:
    """What is told of a job."""

    job: int
    kind: str
    about: dict[str, Any]
    state: State
    done: int  # bytes; less again if it was begun again
    total: int
    rate: int
    on_error: OnError
    error: str  # the last one
    left: bool  # it was cancelled, and what it was to make is there, whole

    def as_json(self) -> dict[str, Any]:
        """For the control socket."""
        return {key.replace("_", "-"): value for key, value in asdict(self).items()}


class Job:
    """One job; all of it is guarded by the lock of *room*, but for what `Reins` says."""

    def __init__(
        self, number: int, work: Work, rate: int, on_error: OnError, room: Room, tell: Callable[[Report], None]
    ) -> None:
        """*tell(report)* comes at each change of its state, on any thread."""
        self._room = room
        self._tell = tell
        self.number = number
        self.work = work
        self.rate = rate
        self.on_error = on_error
        self.error = ""
        self.is_paused = False
        self.is_begun = False  # an attempt is under way
        self.is_ready = False  # it awaits word
        self.was_ready = False  # it was said to
        self.may_finish = False  # it was told to
        self.is_behind = False  # what was done has to be done again
        self.is_finishing = False  # at what nothing holds up
        self.is_cancelled = False
        self.is_leaving = False  # it was, while it was ready: something whole was to be left
        self.has_left = False  # and it was
        self.is_stirred = False  # something of it was changed
        self.reins = Reins()
        self.state = self.standing
        self._is_told = False

    @property
    def standing(self) -> State:
        """Its state while it has not ended."""
        if self.is_paused and not self.is_finishing:
            return State.PAUSED
        if self.is_ready and not (self.may_finish or self.is_cancelled or self.is_behind):
            return State.READY
        return State.RUNNING if self.is_begun or self._room.is_there else State.WAITING

    def turn(self, state: State, error: str = "") -> None:
        """Be in *state* from now on, because of *error*, if there was one."""
        if self._is_told and (state, error or self.error) == (self.state, self.error):
            return
        self._is_told = True
        if error and (error != self.error or state in (State.PAUSED, *ENDED)):
            log.error("job %d, %s, %s: %s", self.number, self.work.kind, state, error)
        self.state, self.error = state, error or self.error
        self._tell(self.report())

    def fall_behind(self) -> None:
        """What was done has to be done again: nobody finds it ready from now on."""
        self.is_behind = True
        if self.state is State.READY:
            self.turn(self.standing)

    def stir(self) -> None:
        """Let who looks after it look."""
        self.is_stirred = True
        self._room.changed.notify_all()

    def report(self) -> Report:
        reins = self.reins
        return Report(
            self.number,
            self.work.kind,
            self.work.about,
            self.state,
            reins.done,
            reins.total,
            self.rate,
            self.on_error,
            self.error,
            self.has_left,
        )
