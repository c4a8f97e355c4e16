"""The chain of the served image, which jobs make shorter: what is in it, and how the image is put over another file.

The header is changed while requests wait, and what the disk needs of the new chain is stable before (law 6). Killed at
any point, the disk is the same through the old chain or the new one.
"""

import errno
import os
from collections.abc import Callable
from contextlib import suppress

from qcow2.driver.task import Task
from qcow2.driver.uri import is_nbd
from qcow2.engine.image import Image
from qcow2.error import UnsupportedImage, no_memory
from qcow2.job.stream import name_of_base
from qcow2.library.hostfile import is_at, require_way
from qcow2.node.node import Node
from vhost.device import Device
from vhost.disk import ImageBackend
from vhost.held import HeldImage
from vhost.job import RoomWanted
from vhost.reach import require_reach


class ServedChain:
    """What *device* serves as *backend* and *held* holds."""

    def __init__(self, device: Device, backend: ImageBackend, held: HeldImage) -> None:
        self.device = device
        self.backend = backend
        self.held = held
        self.on_frozen: Callable[[str, str, str], object] = lambda name, failure, unstable: None

    def require_free(self) -> None:
        """Raises: ValueError if a trace tells of the files that there are."""
        if self.backend.lease is None:
            raise ValueError("a daemon with --trace-io keeps to the files it has")

    def image(self) -> Image:
        """The one that is served, which could be put over another file.

        Raises: RoomWanted if none is held; UnsupportedImage, OSError, ValueError.
        """
        disk = self.held.disk
        if disk is None:
            raise RoomWanted
        if disk.chain.end_below is not None:
            raise OSError(errno.EBUSY, "what the last snapshot froze is not stable yet, a flush tries again")
        image, path = disk.image, disk.files[0].path
        if not isinstance(image, Image):
            raise UnsupportedImage(path, "a raw image has no backing file")
        if image.read_only:
            raise OSError(errno.EROFS, "opened read-only", path)
        image.refuse_snapshots()
        if image.backing is None:
            raise ValueError(f"{path}: has no backing file")
        return image

    def below(self, name: str) -> Node:
        """The disk under the image whose file is *name*, as seen from the image's directory.

        Raises: ValueError if it is not there, OSError.
        """
        assert self.held.disk is not None
        chain, path = self.held.disk.chain, self.held.disk.files[0].path
        if is_nbd(name):
            raise ValueError(f"{name}: no disk that is served is over an export")
        wanted = os.stat(os.path.join(os.path.dirname(os.path.realpath(path)), name))
        for node, file in zip(chain.nodes[1:], chain.files[1:], strict=True):
            if os.path.samestat(wanted, os.fstat(file.fd)):
                return node
        raise ValueError(f"{name}: is not in the backing chain of {path}")

    def require_foreign(self, path: str) -> None:
        """Raises: ValueError if *path*, which is to be written, leads to, or into, what is served, or out; OSError."""
        assert self.held.disk is not None
        require_reach(self.held.options, path)
        if any(is_at(file, path) for file in self.held.disk.files):
            raise ValueError(f"{path}: is a file of the disk that is served")

    def require_over(self, image: Image, base: Node | None) -> tuple[str | None, str | None]:
        """What *image* is to call *base*, and its format.

        Raises: UnsupportedImage if the next open may not follow; ImageError if it would not find *base* so.
        """
        name, image_format = name_of_base(image, base)
        self.held.require_nameable(name)
        if base is not None and name is not None:
            require_way(image.file, name, base.file)
        return name, image_format

    def put_over(self, image: Image, base: Node | None, is_same: Callable[[], bool] = lambda: True) -> None:
        """Put *image* over *base*, and close what was between, on a job's thread.

        Nothing is done unless *is_same()*, asked when nobody can change the disk's size or let it go.
        Raises: RoomWanted; OSError, ImageError.
        """
        errors: list[BaseException] = []
        closing: list[Callable[[], None]] = []

        def begin(done: Callable[[str], None]) -> None:
            def end(task: Task) -> None:
                error = task.take_error()
                if error is not None:
                    errors.append(error)
                done("" if error is None else "failed")

            self.backend.run(image.put_over(base, name, image_format), end)

        with self.device.keeping() as is_held:
            if not is_held or self.held.disk is None or self.held.disk.image is not image or not is_same():
                raise RoomWanted
            name, image_format = self.require_over(image, base)
            refusal = self.device.exchange(begin, lambda: closing.extend(self.held.drop_between(base)), lambda: None)
        for error in errors:
            raise no_memory() if isinstance(error, MemoryError) else error
        if refusal:
            raise OSError(errno.ETIMEDOUT, refusal)
        close_all(closing)


def close_all(closing: list[Callable[[], None]]) -> None:
    """Close what was only read, or is stable."""
    for close in closing:
        with suppress(OSError):
            close()
