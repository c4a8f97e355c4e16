"""An external snapshot of the disk while a guest uses it: the file that is served becomes an overlay.

The overlay is made, and all is made stable once, while requests go on. What is left for the moment in which they wait
is a rename, and the change of the map. Links of what is frozen wait on, and the overlay's own log says so: a kill loses
none. That what was written before, and the name, become stable is what only a FLUSH waits for. What the disk was is
then closed behind the guest's back.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future

from qcow2 import ImageError
from qcow2.driver.memory import SharedMemory
from qcow2.driver.task import Task
from qcow2.node.leftover import require_lasting_name
from qcow2.node.overlay import Overlay
from vhost.device import Device
from vhost.disk import ImageBackend
from vhost.held import HeldImage
from vhost.overlaybitmaps import Found, OverlayBitmaps
from vhost.overlaywish import OverlayWish
from vhost.problem import describe, problem_of
from vhost.reach import require_reach
from virtio.block import Unavailable


class SnapshotRefused(Exception):
    """The disk goes on as it was; one line says why."""


class SnapshotUnstable(Exception):
    """The snapshot is taken, and may not survive a power loss.

    One line says why, and whether a FLUSH may mend that or the disk takes no more writes.
    """


class Pace:
    """Where a snapshot stops until it may go on: nowhere, if it is that of one disk alone."""

    stops = False

    def stop(self) -> None:
        """The overlay is made; then: requests wait; then: it has its name. Raises: SnapshotRefused: call it off."""


class Snapshots:
    """Takes snapshots of the image of *held*, which is under *device* as *backend*. For one thread at a time."""

    def __init__(self, device: Device, backend: ImageBackend, held: HeldImage) -> None:
        self._device = device
        self._backend = backend
        self._held = held

    def take(self, name: str, pace: Pace, wish: OverlayWish) -> str:
        """Freeze what the disk holds now as the file *name*, as seen from the directory of the image; stable on return.

        What is served from then on is as *wish* says.
        -> what went wrong when that was closed, if anything did: its content is whole then, and stable.
        Raises: SnapshotRefused, SnapshotUnstable.
        """
        try:
            require_lasting_name(name)
            with self._device.holding():
                return self._take(name, pace, wish)
        except (OSError, ImageError) as error:
            raise SnapshotRefused(describe(error)) from error
        except (ValueError, Unavailable) as error:
            raise SnapshotRefused(str(error)) from error

    def freeze(self, name: str, wish: OverlayWish) -> str:
        """As `take`, while the device is kept that holds the disk.

        Raises: SnapshotRefused, SnapshotUnstable, OSError, ImageError, ValueError.
        """
        return self._take(name, Pace(), wish)

    def _take(self, name: str, pace: Pace, wish: OverlayWish) -> str:
        options = self._held.options
        require_reach(options, os.path.join(os.path.dirname(os.path.realpath(options.blk_file)), name))
        overlay, bitmaps = self._held.prepare_overlay(name, wish.given), wish.bitmaps
        past: list[SharedMemory | None] = []
        stable: Future[tuple[str, bool]] = Future()
        try:
            overlay.make_tables(self._device.worker.call(lambda: overlay.below.used_lately))
            bitmaps.add(overlay.image)
            if not bitmaps.are_any:  # whose live bits want a longer log
                overlay.begin_log()
            overlay.name_frozen()
            self._flush()
            pace.stop()
            refusal = self._device.exchange(
                lambda done: self._begin(overlay, pace, bitmaps, done),
                lambda: past.append(self._held.adopt_overlay(overlay)),
                lambda: self._backend.defer_flushes(overlay, lambda *end: stable.set_result(end)),
            )
            if refusal:
                raise SnapshotRefused(refusal)
        except BaseException:
            self._held.discard_overlay(overlay)
            raise
        problem, is_late = self._device.worker.wait(stable)
        if is_late:
            raise SnapshotUnstable(
                f"{name} is there, but may not survive a power loss before a flush succeeds: {problem}"
            )
        failure = self._retire(overlay, past[0])
        if problem:
            raise SnapshotUnstable(
                f"{name} is there, but may not survive a power loss, and no more is written: {problem}"
            )
        return failure

    def _flush(self) -> None:
        """Raises: SnapshotRefused."""
        if self._device.flush_now() < 0:
            raise SnapshotRefused("what the disk holds cannot be made stable")

    def _begin(self, overlay: Overlay, pace: Pace, bitmaps: OverlayBitmaps, done: Callable[[str], None]) -> None:
        """Nothing is made stable here but bitmaps: a FLUSH waits for that, other requests do not."""

        def switch(found: Found) -> None:
            bitmaps.carry(overlay.image, found)
            pace.stop()
            overlay.switch()
            try:
                pace.stop()
            except SnapshotRefused:
                overlay.switch_back()
                raise

        def brought(problem: str) -> None:
            if problem:
                done(problem)
            else:
                self._backend.run(bitmaps.look(overlay.below), looked)

        def looked(task: Task) -> None:
            error = task.take_error()
            if error is not None:
                done(problem_of(error))
            elif pace.stops or task.result or not self._backend.is_near:
                self._device.worker.call_host(lambda: switch(task.result), switched)
            else:
                switch_here(task.result)

        def switch_here(found: Found) -> None:
            """Another thread would have to be woken, and this one again."""
            try:
                switch(found)
            except (SnapshotRefused, OSError, ImageError, MemoryError) as error:
                switched(None, error)
            else:
                switched(None, None)

        def switched(_: None, error: BaseException | None) -> None:
            if error is None or isinstance(error, SnapshotRefused):
                done(str(error or ""))
            else:
                done(problem_of(error))

        try:
            may_wait = not bitmaps.are_carried and overlay.let_links_wait()
        except OSError as error:
            done(describe(error))
            return
        if may_wait:
            brought("")
        else:
            self._backend.bring_links(overlay.below, brought)

    def _retire(self, overlay: Overlay, memory: SharedMemory | None) -> str:
        outcome: Future[str] = Future()
        self._device.worker.call(lambda: self._backend.retire(overlay.below, outcome.set_result))
        failure = self._device.worker.wait(outcome)
        try:
            self._held.share_below(overlay)
            if memory is not None and memory.is_made and not failure:
                memory.remove()
        except OSError as error:  # the snapshot is taken all the same
            failure = failure or describe(error)
        return failure
