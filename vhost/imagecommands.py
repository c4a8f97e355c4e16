"""What the control socket may ask of the bitmaps and the internal snapshots of the image; see docs/control.md.

All requests wait while they are changed, as at a resize: what the engine does then it may do offline, too, and with the
same care for a death.
"""

import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from qcow2 import ImageError
from qcow2.engine.bitmapplan import BitmapPlan
from qcow2.engine.bitmaptable import StoredBitmap, dirty_bytes
from qcow2.engine.image import Image
from qcow2.format.snapshot import SnapshotTable, find_snapshot
from qcow2.library.facts import snapshot_facts
from vhost.beside import beside
from vhost.bitmapaction import parse_actions
from vhost.device import Device
from vhost.disk import ImageBackend
from vhost.held import HeldImage
from vhost.problem import describe
from virtio.block import Unavailable

FLUSHES = 2  # before requests wait: what is made stable then has less to do

T = TypeVar("T")


class ImageRefused(Exception):
    """The image is as it was; one line says why."""


class ImageCommands:
    """Changes the image of *held*, which is under *device* as *backend*. For one thread at a time."""

    def __init__(
        self, device: Device, backend: ImageBackend, held: HeldImage, require_no_job: Callable[[], None]
    ) -> None:
        """*require_no_job()* raises while there is a job, which internal snapshots are not to be changed under."""
        self._require_no_job = require_no_job
        self._device = device
        self._backend = backend
        self._held = held

    def bitmap_list(self) -> list[dict[str, Any]]:
        """The bitmaps, and how much of the disk each reports."""

        async def look(image: Image) -> list[tuple[StoredBitmap, bytes | None]]:
            return [(each, await image.bitmap_bits(each) if each.is_usable else None) for each in await image.bitmaps()]

        with self._holding() as image:
            found, size = self._beside(look(image)), image.size
            return [_bitmap_facts(each, bits, size, image) for each, bits in found]

    def bitmap_change(self, actions: object) -> None:
        """Do these one after the other, all of them or none."""
        try:
            wanted = parse_actions(actions)
        except ValueError as error:
            raise ImageRefused(str(error)) from error

        async def plan(bitmaps: BitmapPlan) -> None:
            for action in wanted:
                await action.plan(bitmaps)

        self._alone(lambda image: image.change_bitmaps(plan))

    def snapshot_internal_list(self) -> list[dict[str, Any]]:
        """The internal snapshots."""
        with self._holding() as image:
            return [snapshot_facts(each) for each in self._beside(image.snapshots())]

    def snapshot_internal_create(self, name: object) -> dict[str, Any]:
        """Keep what the disk holds now as the internal snapshot *name*, which there is not."""
        wanted = _name(name)
        with self._holding() as image:
            if any(each.name == wanted for each in self._beside(image.snapshots())):
                raise ImageRefused(f"there is a snapshot {wanted!r}")
            self._require_no_job()

        async def create(image: Image) -> dict[str, Any]:
            return snapshot_facts(await image.create_snapshot(wanted, time.time_ns()))

        return self._alone(create)

    def snapshot_internal_delete(self, name: object) -> None:
        """Forget an internal snapshot; what it alone held is free."""
        wanted = self._existing(name, by_id=False)
        self._require_no_job()
        self._alone(lambda image: image.delete_snapshot(wanted))

    def snapshot_internal_apply(self, name: object) -> None:
        """Let the disk hold what it held at an internal snapshot; no guest is to see that."""
        wanted = self._existing(name, by_id=True)
        self._require_no_job()
        self._alone(lambda image: image.apply_snapshot(wanted), self._require_no_guest)

    def _require_no_guest(self) -> None:
        """While the device is held, which a front-end that comes waits for before it sees the disk."""
        if self._device.session is not None:
            raise ImageRefused("a front-end uses the disk, which would change under its guest: end it first")

    def _existing(self, name: object, *, by_id: bool) -> str:
        """The name of a snapshot that there is. Raises: ImageRefused."""
        wanted = _name(name)
        with self._holding() as image:
            found = self._beside(image.snapshots())
            find_snapshot(image.file.path, SnapshotTable.of(found, image.file.path), wanted, by_id=by_id)
        return wanted

    def _alone(
        self, change: Callable[[Image], Coroutine[Any, Any, T]], require: Callable[[], None] = lambda: None
    ) -> T:
        """Await *change* of the image while requests wait; what it gives. *require()* raises if it may not be."""
        results: list[T] = []

        async def begin(image: Image) -> None:
            results.append(await change(image))

        with self._holding() as image:
            require()
            for _ in range(FLUSHES):
                if self._device.flush_now() < 0:
                    raise ImageRefused("what the disk holds cannot be made stable")
            refusal = self._device.alone(lambda done: self._backend.change(begin(image), done))
        if refusal:
            raise ImageRefused(refusal)
        return results[0]

    def _beside(self, look: Coroutine[Any, Any, T]) -> T:
        """Await *look* at the image beside requests; what it gives."""
        return beside(self._device, self._backend, look)

    @contextmanager
    def _holding(self) -> Iterator[Image]:
        """The image, while nobody lets it go."""
        try:
            with self._device.holding():
                assert self._held.disk is not None
                image = self._held.disk.image
                if not isinstance(image, Image):
                    raise ImageRefused("a raw image has neither bitmaps nor internal snapshots")
                yield image
        except (Unavailable, ValueError) as error:
            raise ImageRefused(str(error)) from error
        except (OSError, ImageError) as error:
            raise ImageRefused(describe(error)) from error


def _name(name: object) -> str:
    if not isinstance(name, str):
        raise ImageRefused(f"{name!r} is not the name of a snapshot")
    return name


def _bitmap_facts(each: StoredBitmap, bits: bytes | None, size: int, image: Image) -> dict[str, Any]:
    record = each.bitmap.record
    return {
        "name": each.bitmap.name,
        "granularity": 1 << record.granularity_bits,
        "enabled": each.bitmap.is_enabled,
        "valid": each.is_usable,
        "busy": image.is_frozen_bitmap(each),
        "dirty": None if bits is None else dirty_bytes(bits, record.granularity_bits, size),
    }
