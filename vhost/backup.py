"""`ctl backup`: the disk of one moment, or what a bitmap says has changed by then, copied while the guest writes on.

The moment is that of the command, before it is answered: while requests wait, the chunks to copy are marked as wanted
(`vhost/frozen.py`). The target is brought what is saved by a thread of its own: one that hangs holds up nobody else. A
bitmap goes on recording; what was copied is cleared in it once the target is whole, but for what has changed since,
unless it is to keep that.
"""

import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from qcow2 import ImageError
from qcow2.driver.task import Task
from qcow2.driver.uri import is_nbd
from qcow2.engine.bitmaptable import set_runs
from qcow2.engine.create import Options
from qcow2.engine.frozenbitmap import FrozenBitmap
from qcow2.engine.image import Image
from qcow2.error import UnsupportedImage, no_memory
from qcow2.format.luks import Encryption
from qcow2.job.pace import Cancelled
from qcow2.job.reins import Reins
from qcow2.node.node import Node
from ring.thread import start_deaf
from vhost.backupexport import BackupExport
from vhost.backuptarget import BackupFile, BackupTarget
from vhost.clock import Clock
from vhost.device import die
from vhost.frozen import CHUNK_BITS, Frozen, Saved, Wanted
from vhost.job import RoomWanted, Work
from vhost.policy import BitmapMode
from vhost.servedchain import ServedChain


class Backup(Work):
    """Copy the disk as it is now, or what *bitmap* says of it, to *target*."""

    kind = "backup"

    def __init__(
        self,
        served: ServedChain,
        target: str,
        image_format: str | None,
        *,
        exists: bool,
        bitmap: str | None,
        bitmap_mode: BitmapMode,
        backing: str | None,
    ) -> None:
        """*target* is as seen from the directory of the image, or an NBD URI; *backing* as seen from that of *target*.

        Raises: RoomWanted; ValueError, UnsupportedImage, OSError if that cannot be done.
        """
        image_format = _format_of(target, image_format, bitmap, backing)
        mode = None if bitmap is None else bitmap_mode
        self.about: dict[str, Any] = {
            "target": target,
            "format": image_format,
            "bitmap": bitmap,
            "bitmap-mode": mode,
            "backing": backing,
        }
        self._is_to_forget = mode is BitmapMode.ON_SUCCESS
        self._served = served
        self._image = self._require_image(bitmap)
        self._bitmap: FrozenBitmap | None = None
        self._clock: Clock | None = None
        encrypted = served.held.encrypted_in()
        if encrypted is not None and image_format == "raw":
            raise UnsupportedImage(encrypted.file.path, "encrypted: a raw backup would hold it in plain")
        self._target: BackupTarget
        if is_nbd(target):
            size, options = self._image.size, served.held.options
            self._target = BackupExport(target, size, options, exists=exists, is_whole=bitmap is None)
            self._begin_copy(bitmap)
            return
        with served.held.encrypted_as_copied() as encryption:
            self._target = self._file_of(target, image_format, backing, encryption, exists=exists)
            self._begin_copy(bitmap)

    def _file_of(
        self, target: str, image_format: str, backing: str | None, encryption: Encryption | None, *, exists: bool
    ) -> BackupFile:
        path, held = os.path.join(os.path.dirname(os.path.realpath(self._image.file.path)), target), self._served.held
        self._served.require_foreign(path)
        backing_format = None if backing is None else "qcow2"
        options = Options(self._image.size, backing_name=backing, backing_format=backing_format, encryption=encryption)
        allowed = held.options.allow_files
        return BackupFile(
            path,
            options,
            image_format,
            exists=exists,
            is_increment=self.about["bitmap"] is not None,
            keys=held.other_keys(),
            allow_files=allowed,
        )

    def _begin_copy(self, bitmap: str | None) -> None:
        """Freeze the disk, and only then, since that may be refused, overwrite what is at the target."""
        try:
            self._feed = Feed(self._target.put, self._taken, self._stopped)
        except BaseException:
            self._target.close()
            raise
        try:
            self._freeze(bitmap)
        except BaseException:
            self._close()
            raise
        try:
            self._clock = Clock(self._tick)  # before what may hang
            self._target.begin()
        except BaseException:
            self.leave()
            raise
        self._feed.go_on()

    def _require_image(self, bitmap: str | None) -> Node:
        disk = self._served.held.disk
        if disk is None or not self._served.device.is_attached:
            raise RoomWanted
        image, path = disk.image, disk.files[0].path
        if bitmap is not None and not isinstance(image, Image):
            raise UnsupportedImage(path, "a raw image has no bitmaps")
        if bitmap is not None and image.read_only:
            raise OSError(errno.EROFS, "opened read-only", path)
        return image

    def _freeze(self, bitmap: str | None) -> None:
        """Let changes ask from this moment on. Raises: OSError, ImageError, ValueError."""

        async def look() -> None:
            if bitmap is not None:
                assert isinstance(self._image, Image)
                self._bitmap = await self._image.freeze_bitmap(bitmap)
            try:
                device = self._served.device
                self._frozen = Frozen(self._image, self._wanted(), self._feed.give, lambda: device.is_alone)
            except MemoryError:  # of a copy, which is no reason to trust the disk no more
                if self._bitmap is not None:
                    assert isinstance(self._image, Image)
                    await self._image.thaw_bitmap(self._bitmap, is_copied=False)
                raise no_memory() from None
            self._frozen.on_end = lambda: self.on_behind()  # which is not known yet
            self._served.backend.freeze(self._frozen)  # the target may take something before this thread goes on

        self._alone(look())

    def _wanted(self) -> Wanted:
        size = self._image.size
        if self._bitmap is None:
            return Wanted(size, [(0, size)])
        bits = self._bitmap.granularity_bits
        if bits == CHUNK_BITS:
            return Wanted.of_bits(size, self._bitmap.bits)
        return Wanted(size, [(first << bits, end << bits) for first, end in set_runs(self._bitmap.bits)])

    def _alone(self, step: Coroutine[Any, Any, None]) -> None:
        """Do *step* on the image while no request is under way. Raises: ValueError."""
        refusal = self._served.device.alone(lambda done: self._served.backend.change(step, done))
        if refusal:
            step.close()
            raise ValueError(refusal)

    def prepare(self) -> None:
        if self.is_lost:
            raise ValueError(self._frozen.ended)
        self._served.device.worker.call(self._frozen.try_again)  # before the target may fail once more
        self._feed.go_on()

    @property
    def is_lost(self) -> bool:
        return bool(self._frozen.ended)

    def begin(self, reins: Reins) -> Coroutine[Any, Any, None]:
        return self._frozen.walk(reins)

    def look(self) -> None:
        self._frozen.look()

    def finish(self) -> None:
        self._feed.close()
        self._target.finish()
        if self._bitmap is not None and self._is_to_forget:
            self._forget(self._bitmap)

    def _forget(self, bitmap: FrozenBitmap) -> None:
        """Raises: ValueError."""
        image = self._image
        assert isinstance(image, Image)

        async def forget() -> None:
            await image.flush()  # else a power loss could bring back an older disk, which no bit tells of
            await image.thaw_bitmap(bitmap, is_copied=True)

        with self._served.device.keeping():
            try:
                if not self._is_held:
                    raise ValueError("the image was let go")
                self._alone(forget())
            except ValueError as error:
                text = f"the backup is whole, but bitmap {bitmap.name!r} has forgotten nothing: {error}"
                raise ValueError(text) from error

    @property
    def _is_held(self) -> bool:
        """Whether what is served is what was copied."""
        disk = self._served.held.disk
        return self._served.device.is_attached and disk is not None and disk.image is self._image

    def abort(self) -> None:
        self._target.abort()

    def leave(self) -> None:
        try:
            self._served.device.worker.call(self._thaw)
        finally:
            self._close()

    def _thaw(self) -> None:
        """On the worker: nobody wants to know any more what changes."""
        self._frozen.lose("its backup has ended")
        self._served.backend.thaw(self._frozen)
        if self._bitmap is not None and self._is_held:
            assert isinstance(self._image, Image)
            self._served.backend.run(self._image.thaw_bitmap(self._bitmap, is_copied=False), _forget_error)

    def _close(self) -> None:
        if self._clock is not None:
            self._clock.close()
        self._target.abort()
        self._feed.close()
        self._target.close()

    # on the threads of the target and of the clock

    def _taken(self, nbytes: int) -> None:
        self._tell(partial(self._frozen.taken, nbytes))

    def _stopped(self, error: Exception) -> None:
        self._tell(partial(self._frozen.stop, error))

    def _tick(self) -> None:
        self._tell(self._frozen.look)

    def _tell(self, tell: Callable[[], None]) -> None:
        def told() -> None:
            tell()
            self._served.backend.go_on()

        self._served.device.worker.tell(told)  # a request may wait for it, which the worker waits for


def _format_of(target: str, image_format: str | None, bitmap: str | None, backing: str | None) -> str:
    """The format of the target, as it was said or not. Raises: ValueError for what makes no sense together."""
    is_export = is_nbd(target)
    image_format = image_format or ("raw" if is_export else "qcow2")
    if is_export and (image_format != "raw" or backing is not None):
        raise ValueError("an export is a raw disk: what lies under it, and in which format, its server says")
    if bitmap is not None and image_format != "qcow2" and not is_export:
        raise ValueError("what a bitmap says goes to a qcow2 image: a raw file cannot say what it lacks")
    return image_format


def _forget_error(task: Task) -> None:
    """An image that has failed keeps its bitmap frozen: nothing changes it any more."""
    task.take_error()


class Feed:
    """Gives *put* what it is given, in order, on a thread of its own; says what it has taken, or what stopped it."""

    def __init__(
        self, put: Callable[[Saved], None], on_taken: Callable[[int], None], on_stopped: Callable[[Exception], None]
    ) -> None:
        """It puts nothing before `go_on`. Raises: OSError if there is no thread to be had."""
        self._put = put
        self._on_taken = on_taken
        self._on_stopped = on_stopped
        self._changed = threading.Condition()
        self._saved: deque[Saved] = deque()  # the first one is being put
        self._is_stopped = True  # by an error; at first until there is a target
        self._is_ending = False
        self._thread = threading.Thread(target=self._main, name="backup", daemon=True)
        start_deaf(self._thread)

    def give(self, saved: Saved) -> None:
        """Let *saved* be put after what came before. Never waits."""
        with self._changed:
            self._saved.append(saved)
            self._changed.notify()

    def go_on(self) -> None:
        """There is a target; or, after an error other than an ImageError: try again."""
        with self._changed:
            self._is_stopped = False
            self._changed.notify()

    def close(self) -> None:
        """Put no more, and return once nothing is under way; a second time does nothing."""
        with self._changed:
            self._is_ending = True
            self._changed.notify()
        self._thread.join()
        self._saved.clear()

    def _main(self) -> None:
        try:
            while (saved := self._next()) is not None:
                self._put_one(saved)
        except RuntimeError:  # the worker has ended, and nobody asks
            pass
        except BaseException as error:  # a bug of ours: nobody knows what is saved
            die(error)

    def _next(self) -> Saved | None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_ending or (self._saved and not self._is_stopped))
            return None if self._is_ending else self._saved[0]

    def _stop(self, error: Exception) -> None:
        with self._changed:
            self._is_stopped = True
            self._is_ending |= isinstance(error, ImageError)  # it may not be put a second time
        self._on_stopped(error)

    def _put_one(self, saved: Saved) -> None:
        try:
            self._put(saved)
        except (OSError, ImageError, Cancelled) as error:
            self._stop(error)
            return
        except MemoryError:
            self._stop(no_memory())
            return
        with self._changed:
            self._saved.popleft()
        self._on_taken(0 if saved.data is None else saved.nbytes)
