"""`ctl stream`: the served image has itself what shows through it, and needs those it showed through no more.

What is copied is stable before the header names another backing file (law 6), and that is done while requests wait:
killed at any point, the disk is the same through the old chain or the new one.
"""

import errno
import os
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from qcow2.driver.task import Task
from qcow2.engine.image import Image
from qcow2.error import UnsupportedImage, no_memory
from qcow2.job.pace import Pace
from qcow2.job.stream import name_of_base, stream
from qcow2.node.node import Node
from vhost.device import Device
from vhost.disk import ImageBackend
from vhost.held import HeldImage
from vhost.jobs import RoomWanted

WIDTH = 4  # windows at a time, which is not to keep requests waiting
WINDOW = 512 << 10  # bytes


class Streaming:
    """Work for `Jobs`: pull what is above *base*, a file of the chain, into the image of *held*; None: all of it."""

    kind = "stream"

    def __init__(self, device: Device, backend: ImageBackend, held: HeldImage, base: str | None) -> None:
        """*base* is as seen from the directory of the image.

        Raises: ValueError, UnsupportedImage, OSError if that cannot be done.
        """
        if backend.lease is None:
            raise ValueError("no stream: a daemon with --trace-io keeps to the files it has")
        self.about: dict[str, Any] = {"base": base}
        self._device = device
        self._backend = backend
        self._held = held
        self._base = base
        self._image, _ = self._find()
        self._size = 0  # of the disk that was looked at

    def _find(self) -> tuple[Image, Node | None]:
        """The image that is served, and the base in its chain, as they are now."""
        disk = self._held.disk
        if disk is None:
            raise RoomWanted
        image, path = disk.image, disk.files[0].path
        if not isinstance(image, Image):
            raise UnsupportedImage(path, "a raw image has no backing file")
        if image.read_only:
            raise OSError(errno.EROFS, "opened read-only", path)
        image.refuse_snapshots()
        if image.backing is None:
            raise ValueError(f"{path}: has no backing file")
        if self._base is None:
            return image, None
        wanted = os.stat(os.path.join(os.path.dirname(os.path.realpath(path)), self._base))
        for node, file in zip(disk.chain.nodes[1:], disk.chain.files[1:], strict=True):
            if os.path.samestat(wanted, os.fstat(file.fd)):
                return image, self._below(node, path)
        raise ValueError(f"{self._base}: is not in the backing chain of {path}")

    def _below(self, base: Node, path: str) -> Node:
        if self._held.disk is not None and self._held.disk.image.backing is base:
            raise ValueError(f"{self._base}: is the backing file of {path} already")
        return base

    def begin(self, pace: Pace) -> Coroutine[Any, Any, None]:
        self._image, base = self._find()
        self._size = self._image.size
        return stream(self._image, base, pace, width=WIDTH, window=WINDOW)

    def finish(self) -> None:
        with self._device.keeping() as is_held:
            if not is_held or self._held.disk is None or self._held.disk.image is not self._image:
                raise RoomWanted
            image, base = self._find()
            if image.size != self._size:  # nobody has looked at what is new
                raise RoomWanted
            name, image_format = name_of_base(image, base)
            self._held.require_nameable(name)
            errors: list[BaseException] = []
            closing: list[Callable[[], None]] = []
            refusal = self._device.exchange(
                lambda done: self._put_over(image, base, name, image_format, errors, done),
                lambda: closing.extend(self._held.drop_between(base)),
                lambda: None,
            )
        for error in errors:
            raise no_memory() if isinstance(error, MemoryError) else error
        if refusal:
            raise OSError(errno.ETIMEDOUT, refusal)
        for close in closing:
            with suppress(OSError):  # what was only read
                close()

    def _put_over(
        self,
        image: Image,
        base: Node | None,
        name: str | None,
        image_format: str | None,
        errors: list[BaseException],
        done: Callable[[str], None],
    ) -> None:
        def end(task: Task) -> None:
            error = task.take_error()
            if error is not None:
                errors.append(error)
            done("failed" if error is not None else "")

        self._backend.run(image.put_over(base, name, image_format), end)
