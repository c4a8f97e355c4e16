"""`ctl mirror`: the disk is copied to another place and kept in step with it, until the copy is served or left.

The copy is opened as the image is, beside it, with files of its own down to the base. While requests wait it takes the
image's place: what it holds is stable before the path that is served leads to it. A death before finds the disk that
was served, a death after its copy.
"""

import errno
import logging
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

from qcow2 import Disk
from qcow2.driver.uri import is_nbd
from qcow2.engine.image import Image
from qcow2.error import UnsupportedImage
from qcow2.job.mirror import Mirror
from qcow2.job.pace import Pace
from qcow2.node.node import Node
from qcow2.node.pivot import Pivot, require_turnable
from vhost.beside import beside
from vhost.device import PATIENCE_SECONDS
from vhost.job import JobFailed, RoomWanted, Work
from vhost.mirrorcopy import CopyExport, CopyFile, CopyPlace
from vhost.policy import COPY_FORMATS
from vhost.problem import describe, problem_of
from vhost.reach import require_turn
from vhost.servedchain import ServedChain

WIDTH = 4  # chunks at a time, which is not to keep requests waiting
AGAIN_SECONDS = 10.0  # between two attempts to be rid of the copy, at each of which requests wait
AGAIN_PATIENCE_SECONDS = 0.5  # at all but the first: what has not ended by then hangs, and all the others wait for it

log = logging.getLogger("vhost")


class Mirroring(Work):
    """Copy the disk that is *served* to *target*, as seen from the directory of the image, and keep the two in step."""

    kind = "mirror"
    awaits_word = True

    def __init__(
        self, served: ServedChain, target: str, image_format: str | None, *, only_top: bool, is_existing: bool
    ) -> None:
        """Raises: RoomWanted; ValueError, UnsupportedImage, OSError if that cannot be done."""
        served.require_free()
        self._device = served.device
        self._backend = served.backend
        self._held = held = served.held
        self._only_top = only_top
        is_export = is_nbd(target)
        self._format = image_format or ("raw" if is_export else held.options.format)
        self._mirror: Mirror | None = None
        self._copy: Disk | None = None  # that `_mirror` writes
        self._left: Disk | None = None  # it before, which is to be closed
        self._is_to_end = False  # before it was ready
        self._is_over = False  # the copy is served, or left whole
        self._unclean: OSError | None = None  # why what was served is not closed cleanly
        image = self._require_possible()
        self._place: CopyPlace
        if is_export and self._format != "raw":
            raise ValueError(f"{target}: an export is a raw disk, not {self._format}")
        if is_export:
            self._place = CopyExport(held, target, exists=is_existing)
        else:
            self._place = CopyFile(served, target, self._format, only_top=only_top, exists=is_existing)
        self._place.try_out(image)
        self.about: dict[str, Any] = {
            "target": target,
            "format": self._format,
            "top": only_top,
            "existing": is_existing,
        }

    def _require_possible(self) -> Node:
        if self._held.disk is None:
            raise RoomWanted
        image = self._held.disk.image
        if self._format not in COPY_FORMATS:
            raise ValueError(f"a copy is {' or '.join(COPY_FORMATS)}, not {self._format!r}")
        if image.read_only:
            raise OSError(errno.EROFS, "opened read-only", image.file.path)
        encrypted = self._held.encrypted_in(only_top=self._only_top)
        if encrypted is not None and self._format == "raw":
            raise UnsupportedImage(encrypted.file.path, "encrypted: a raw copy would hold it in plain")
        if self._only_top and not (isinstance(image, Image) and image.backing is not None and self._format == "qcow2"):
            raise UnsupportedImage(
                image.file.path, "only what is over a backing file has a top, and a qcow2 copy of it"
            )
        return image

    # the copy

    def prepare(self) -> None:
        was_usable = self._is_usable()
        if not was_usable:  # which nobody else changes
            with self._device.keeping():
                self._drop()
            self._close_left()
            self._place.reach()
        with self._device.keeping() as is_held:
            if not is_held or (was_usable and not self._is_usable()):
                raise RoomWanted
            if not was_usable:
                self._begin_anew()

    def _is_usable(self) -> bool:
        return self._is_under_way() and self._mirror is not None and not self._mirror.is_broken

    def _is_under_way(self) -> bool:
        """Whether the guest's changes come by; the device is kept."""
        return self._mirror is not None and self._backend.layer is self._mirror

    def _begin_anew(self) -> None:
        assert self._held.disk is not None
        source = self._held.disk.image
        self._copy = copy = self._place.open(source)
        try:
            self._mirror = mirror = Mirror(source, copy.image, only_top=self._only_top, is_new=self._place.is_new)
            mirror.on_behind = self.on_behind
            self._place.on_lost = partial(self._tell_of_loss, mirror)
            self._exchange(
                lambda done: done(""),
                lambda: self._put_beside(copy),
                lambda: self._backend.put_between(mirror),
            )
        except BaseException:
            self._copy = None
            self._held.close_beside(copy)
            raise

    def _tell_of_loss(self, mirror: Mirror, error: OSError) -> None:
        """On any thread."""
        with suppress(RuntimeError):  # the worker has ended, and nobody asks
            self._device.worker.post(partial(mirror.lose, error))

    def begin(self, pace: Pace) -> Coroutine[Any, Any, None]:
        if not self._is_under_way() or self._mirror is None:
            raise RoomWanted
        return self._catch_up(self._mirror, pace)

    async def _catch_up(self, mirror: Mirror, pace: Pace) -> None:
        try:
            await mirror.catch_up(pace, width=WIDTH)
        except OSError:
            if self._is_to_end:
                pace.require_going()  # who was told to end has not failed; who has to make room may have
            raise

    def abort(self) -> None:
        self._is_to_end = True
        self._place.abort()

    # its end

    def require_finishable(self) -> None:
        self._place.require_servable()
        disk = self._held.disk
        if disk is None:
            raise ValueError("the image is not held")
        if self._format != self._held.options.format:
            path = disk.files[0].path
            raise ValueError(
                f"{path} is served as {self._held.options.format}, its copy is {self._format}: it can be left only"
            )
        if self._held.options.data_file is not None:
            raise ValueError("a daemon with --data-file would use it for the copy")
        if isinstance(self._place, CopyFile):
            require_turn(self._held.options, self._place.path)
        require_turnable(self._held.options.blk_file, disk.files[0])

    def finish(self) -> None:
        try:
            self._place.settle()
        except OSError as error:  # which is told once: another sync could succeed
            raise _failed(error) from error
        with self._device.keeping() as is_held:
            if not is_held or not self._is_under_way():
                raise RoomWanted
            self.require_finishable()
            assert self._copy is not None
            beside(self._device, self._backend, self._copy.image.flush())
            try:
                self._place.name()
                past, problem = self._serve_copy()
            except BaseException:
                with suppress(OSError):
                    self._place.unname()
                raise
        self._close(past)
        if problem:
            raise JobFailed(f"the copy is served, but may not be after a power loss, and no more is written: {problem}")

    def _serve_copy(self) -> tuple[Disk, str]:
        """-> what was served, and what is wrong with the path, if anything is. Raises: RoomWanted, OSError."""
        assert self._held.disk is not None
        assert self._copy is not None
        copy = self._copy.image
        path = self._place.path
        pivot = Pivot(self._held.options.blk_file, self._held.disk.files[0], path, self._copy.files[0])
        past: list[Disk] = []
        problems: list[str] = []

        def turn() -> None:
            pivot.switch()
            try:
                pivot.sync()
            except (OSError, MemoryError) as error:  # the path is turned: no failure may undo it
                problems.append(problem_of(error))

        def begin(done: Callable[[str], None]) -> None:
            self._bring(lambda problem: done(problem) if problem else self._on_host(turn, done))

        def swap() -> None:
            past.append(self._held.serve_beside())

        def attached() -> None:
            for problem in problems:
                copy.fail(OSError(errno.EIO, problem))

        try:
            pivot.prepare()
            self._exchange(begin, swap, attached)
        except BaseException:
            pivot.discard()
            raise
        self._copy = self._mirror = None
        self._is_over = True
        return past[0], "; ".join(problems)

    def _bring(self, done: Callable[[str], None]) -> None:
        """On the worker, while nothing is under way: *done("")* once what the disk holds is in the copy, and stable."""
        if self._mirror is None or not self._mirror.is_in_step:
            done(BEHIND)
        else:
            self._backend.run(self._mirror.flush(), lambda task: done(problem_of(task.take_error())))

    def _on_host(self, function: Callable[[], None], done: Callable[[str], None]) -> None:
        self._device.worker.call_host(function, lambda _, error: done(problem_of(error)))

    @property
    def is_whole(self) -> bool:
        return self._is_under_way() and self._mirror is not None and self._mirror.is_in_step

    def part(self) -> None:
        try:
            self._place.settle()
            while not self._has_parted():  # the copy is whole as long as it is beside the disk
                time.sleep(AGAIN_SECONDS)
        except OSError as error:
            raise _failed(error) from error

    def _has_parted(self) -> bool:
        """Whether requests that are under way have let it. Raises: OSError, RoomWanted, JobFailed."""
        with self._device.keeping() as is_held:
            if not is_held or not self._is_under_way() or self._mirror is None:
                raise JobFailed(f"{self._place.path}: the image was let go, and no copy is left")
            mirror = self._mirror
            refusal = self._device.exchange(
                lambda done: done("" if mirror.is_in_step else BEHIND),
                lambda: self._put_beside(None),
                lambda: None,
                PATIENCE_SECONDS,
            )
            if refusal == BEHIND:
                raise RoomWanted
            if refusal:
                log.warning("%s: a copy that is whole is not left yet: %s", self._place.path, refusal)
                return False
            copy, self._copy, self._mirror = self._copy, None, None
        assert copy is not None
        self._held.close_clean(copy)
        self._is_over = True
        self._name()
        return True

    def _name(self) -> None:
        """Let the copy, which is whole, have its name. Raises: FileNotFoundError; JobFailed, and it stays there."""
        try:
            self._place.name()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise JobFailed(f"{self._place.place}: the copy is whole, and stays there: {describe(error)}") from error

    def leave(self) -> None:
        """Return once the copy is out of the guest's way: no change goes to what no job looks after.

        Raises: OSError if what was served is not closed cleanly.
        """
        while not self._let_out():
            time.sleep(AGAIN_SECONDS)
        if self._unclean is not None:
            raise self._unclean

    def _let_out(self) -> bool:
        """Whether the copy is not beside the disk any more; what is not whole is gone, or said to be left."""
        with self._device.keeping():
            with suppress(OSError, MemoryError):
                self._drop()
            if self._is_beside():
                return False
        try:
            self._close_left()
            if not self._is_over:
                self._place.discard()
        except (OSError, MemoryError) as error:
            log.error("%s: a copy that is not whole is left: %s", self._place.path, problem_of(error))
        return True

    def _is_beside(self) -> bool:
        """Whether the worker has the copy; the device is kept."""
        return self._copy is not None and self._held.beside is self._copy

    def _drop(self) -> None:
        """Let the copy go, which is not whole, for `_close_left`; the device is kept. Raises: OSError, MemoryError."""
        if self._is_beside():
            patience = PATIENCE_SECONDS if self._is_under_way() else AGAIN_PATIENCE_SECONDS
            self._device.worker.call(self._leave_layer)  # whether what is under way ends or not
            self._exchange(lambda done: done(""), lambda: self._put_beside(None), lambda: None, patience)
            self._left = self._copy
        elif self._copy is not None and self._stays(self._copy):  # else, as the image was let go, it is closed
            self._left = self._copy
        self._copy = self._mirror = None

    def _close_left(self) -> None:
        """Close what was the copy: clean, if it is an image that stays, however long that takes."""
        left, self._left = self._left, None
        if left is None:
            return
        is_sound = self._stays(left) and left.image.failure is None
        try:
            (self._held.close_clean if is_sound else self._held.close_beside)(left)
        except OSError as error:
            log.error("%s: is not closed cleanly: %s", self._place.path, describe(error))

    def _stays(self, copy: Disk) -> bool:
        return not self._place.is_new and isinstance(copy.image, Image)

    def _leave_layer(self) -> None:
        """On the worker: changes that come from now on go to the disk alone."""
        if self._is_under_way():
            self._backend.put_between(None)

    def _put_beside(self, copy: Disk | None) -> None:
        """The worker has nothing of the image."""
        self._held.beside, self._held.is_beside_kept = copy, copy is not None and self._stays(copy)

    def _exchange(
        self,
        begin: Callable[[Callable[[str], None]], None],
        swap: Callable[[], None],
        attached: Callable[[], None],
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        """Raises: RoomWanted, OSError."""
        refusal = self._device.exchange(begin, swap, attached, patience)
        if refusal == BEHIND:
            raise RoomWanted
        if refusal:
            raise OSError(errno.EIO, refusal)

    def _close(self, past: Disk) -> None:
        try:
            self._held.close_clean(past)
        except OSError as error:  # its content is whole all the same
            said = f"what was served is not closed cleanly: {error.strerror}"
            self._unclean = OSError(error.errno, said, past.files[0].path)


def _failed(error: OSError) -> JobFailed:
    return JobFailed(f"no copy is left: {describe(error)}")


BEHIND = "the copy is behind"
