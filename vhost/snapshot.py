"""An external snapshot of the disk while a guest uses it: the file that is served becomes an overlay.

The overlay is made, and all is made stable once, while requests go on. What is left for the moment in which they wait
is another flush, two names, and the change of the map. What it was is then closed cleanly behind the guest's back.
"""

from collections.abc import Callable
from concurrent.futures import Future

from qcow2 import ImageError
from qcow2.driver.memory import SharedMemory
from qcow2.node.overlay import Overlay
from vhost.device import Device
from vhost.disk import ImageBackend
from vhost.held import HeldImage, describe
from virtio.block import Unavailable


class SnapshotRefused(Exception):
    """The disk goes on as it was; one line says why."""


class Snapshots:
    """Takes snapshots of the image of *held*, which is under *device* as *backend*. For one thread at a time."""

    def __init__(self, device: Device, backend: ImageBackend, held: HeldImage) -> None:
        self._device = device
        self._backend = backend
        self._held = held

    def take(self, name: str) -> str:
        """Freeze what the disk holds now as the file *name*, as seen from the directory of the image.

        -> what went wrong when that was closed, if anything did: its content is whole then, and stable.
        Raises: SnapshotRefused.
        """
        try:
            with self._device.holding():
                return self._take(name)
        except (OSError, ImageError) as error:
            raise SnapshotRefused(describe(error)) from error
        except (ValueError, Unavailable) as error:
            raise SnapshotRefused(str(error)) from error

    def _take(self, name: str) -> str:
        overlay = self._held.prepare_overlay(name)
        past: list[SharedMemory | None] = []
        try:
            self._flush()  # so that the one that requests wait for finds little to do
            overlay.name_frozen()
            refusal = self._device.exchange(
                lambda done: self._begin(overlay, done),
                lambda: past.append(self._held.adopt_overlay(overlay)),
                lambda: _fail_if_unstable(overlay),
            )
            if refusal:
                raise SnapshotRefused(refusal)
        except BaseException:
            self._held.discard_overlay(overlay)
            raise
        return self._retire(overlay, past[0])

    def _flush(self) -> None:
        outcome: Future[int] = Future()
        self._device.flush(outcome.set_result)
        self._device.worker.wait(outcome)  # if it failed, the next one will

    def _begin(self, overlay: Overlay, done: Callable[[str], None]) -> None:
        def flushed(result: int) -> None:
            if result < 0:
                done("what the disk holds cannot be made stable")
            else:
                self._device.worker.call_host(overlay.switch, switched)

        def switched(_: None, error: BaseException | None) -> None:
            if error is not None and not isinstance(error, OSError):
                raise error
            done("" if error is None else describe(error))

        self._backend.flush(flushed)

    def _retire(self, overlay: Overlay, memory: SharedMemory | None) -> str:
        outcome: Future[str] = Future()
        self._device.worker.call(lambda: self._backend.retire(overlay.below, outcome.set_result))
        failure = self._device.worker.wait(outcome)
        try:
            overlay.share_below()
            if memory is not None and memory.is_made and not failure:
                memory.remove()
        except OSError as error:  # the snapshot is taken all the same
            failure = failure or describe(error)
        return failure


def _fail_if_unstable(overlay: Overlay) -> None:
    """No FLUSH may be answered as if the new name would survive a power loss."""
    if overlay.sync_error is not None:
        overlay.image.fail(overlay.sync_error)
