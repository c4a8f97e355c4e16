"""What a snapshot leaves to be made stable: the name of the overlay, and what is below it.

Where the host lacks space, or nothing was tried, nothing is lost: whoever wants it stable next tries again.
"""

import errno
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from qcow2 import ImageError
from qcow2.driver.operation import Signal
from qcow2.driver.task import Task
from qcow2.engine.linkpolicy import LinkPolicy
from qcow2.engine.stability import is_harmless
from qcow2.error import NotTried
from qcow2.node.overlay import Overlay
from vhost.problem import describe, problem_of

log = logging.getLogger("vhost")


class Runs(Protocol):
    """Who runs what the past needs, on the worker."""

    def run(self, coroutine: Coroutine[Any, Any, Any], on_end: Callable[[Task], None]) -> None: ...
    def go_on(self) -> None: ...
    def share_below(self, overlay: Overlay) -> None: ...
    def call_host(self, function: Callable[[], None], done: Callable[[None, BaseException | None], None]) -> None: ...


class Attempt:
    """To make it stable; once it has *ended* there is an *error*, or none."""

    def __init__(self) -> None:
        self.ended = Signal()
        self.error: OSError | None = None


class Past:
    """That of *overlay*, which is served now: no FLUSH succeeds before `wait` does. On the worker alone."""

    def __init__(self, overlay: Overlay, runs: Runs, on_end: Callable[[], None]) -> None:
        """*on_end()* once all is stable, or never will be: the overlay takes no more writes then."""
        self._overlay = overlay
        self._runs = runs
        self._on_end = on_end
        self._attempt: Attempt | None = Attempt()  # the first one, that of the snapshot
        self._is_lost = False
        self.is_late = False  # the first attempt has failed
        overlay.below.on_failure = self._lose  # which is told here
        overlay.below.set_link_policy(LinkPolicy())  # a FLUSH waits for all of it

    def _lose(self) -> None:
        self._is_lost = True

    async def wait(self) -> None:
        """Return once all is stable; where nobody tries, try. Raises: OSError."""
        attempt = self._attempt
        if attempt is None:
            attempt = self._attempt = Attempt()
            self.begin(lambda problem, is_late: None)
        await attempt.ended.wait()
        if attempt.error is not None:
            raise attempt.error

    def begin(self, done: Callable[[str, bool], None]) -> None:
        """Make the attempt that others wait for; *done(problem, is_late)* is last, *problem* empty if all is well."""
        errors: list[BaseException | None] = []
        syncs: list[str] = []

        def ended(error: BaseException | None) -> None:
            errors.append(error)
            if len(errors) == 2:
                self._go_on(errors, done)

        def sync() -> None:
            syncs.append("begun")
            self._overlay.sync_names()

        def named(_: None, error: BaseException | None) -> None:
            if error is not None and not isinstance(error, NotTried):
                if syncs:
                    self._lose()
                else:
                    error = NotTried(errno.EAGAIN, problem_of(error))
            ended(error)

        self._runs.run(self._overlay.below.flush(), lambda task: ended(task.take_error()))
        self._runs.call_host(sync, named)

    def _go_on(self, errors: list[BaseException | None], done: Callable[[str, bool], None]) -> None:
        if any(errors):
            self._end(errors, done)
        else:
            self._runs.run(self._forget(), lambda task: self._end([task.take_error()], done))

    async def _forget(self) -> None:
        await self._overlay.image.forget_below()
        if self.is_late:  # nobody else will
            try:
                await self._overlay.end_below()
                self._runs.share_below(self._overlay)
            except (OSError, ImageError) as error:  # its content is whole all the same
                log.error("%s: is not closed cleanly: %s", self._overlay.below.file.path, describe(error))

    def _end(self, errors: list[BaseException | None], done: Callable[[str, bool], None]) -> None:
        failures = [error for error in errors if error is not None]
        problem = "; ".join(map(problem_of, failures))
        is_final = self._is_lost or not all(isinstance(each, OSError) and is_harmless(each) for each in failures)
        assert self._attempt is not None
        attempt, self._attempt = self._attempt, None
        if problem:
            attempt.error = OSError(errno.EIO if is_final else errno.ENOSPC, problem)
        if problem and is_final:
            self._overlay.image.fail(OSError(errno.EIO, problem))
        self.is_late = bool(problem) and not is_final
        if self.is_late:
            self._overlay.keep_below()
        else:
            self._on_end()
        attempt.ended.set()
        self._runs.go_on()
        done(problem, self.is_late)
