"""`ctl commit`: what is frozen between the served image and a base is brought into the base, and not needed any more.

The base is opened for writing in the place of the one that was only read. What is written to it nobody sees: the files
between hide it, until all of it is stable and the served image is put over the base.
"""

import errno
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

from qcow2.engine.image import Image
from qcow2.job.commit import commit
from qcow2.job.pace import Pace
from qcow2.node.node import Node
from ring.thread import new_future
from vhost.job import RoomWanted, Work
from vhost.servedchain import ServedChain, close_all

WIDTH = 4  # windows at a time, which is not to keep requests waiting
WINDOW = 512 << 10  # bytes

log = logging.getLogger("vhost")


class Committing(Work):
    """Bring what is between the served image and *base*, a file of its chain, into that; None: its backing file's."""

    kind = "commit"

    def __init__(self, served: ServedChain, base: str | None) -> None:
        """*base* is as seen from the directory of the image.

        Raises: RoomWanted; ValueError, UnsupportedImage, OSError if that cannot be done.
        """
        served.require_free()
        self.about: dict[str, Any] = {"base": base}
        self._served = served
        self._base = base
        self._image, self._top, self._below = self._find()

    def _find(self) -> tuple[Image, Image, Node]:
        """The served image, the top of what is committed, and the base, as they are now."""
        image = self._served.image()
        top, path = image.backing, image.file.path
        assert self._served.held.disk is not None
        nodes = self._served.held.disk.chain.nodes
        if len(nodes) < 3 or not isinstance(top, Image):
            raise ValueError(f"{path}: nothing is between it and a base; `ctl snapshot` freezes what it holds")
        base = nodes[2] if self._base is None else self._served.below(self._base)
        if base is top:
            raise ValueError(f"{self._base}: is the backing file of {path}: nothing is between them")
        if top.size < min(image.size, base.size):
            raise ValueError(f"{top.file.path}: is shorter than {path} and than {base.file.path}, which would show")
        return image, top, base

    def prepare(self) -> None:
        with self._served.device.keeping() as is_held:
            if not is_held:
                raise RoomWanted
            self._image, self._top, base = self._find()
            if base is not self._served.held.written_below:
                self._open(base)
            self._below = self._find()[2]

    def _open(self, base: Node) -> None:
        opened = self._served.held.prepare_writer(base, self._top.size)
        closing: list[Callable[[], None]] = []
        try:
            refusal = self._served.device.exchange(
                lambda done: done(""),
                lambda: closing.extend(self._served.held.adopt_writer(opened)),
                lambda: None,
            )
        except BaseException:
            self._served.held.discard_writer(opened)
            raise
        if refusal:
            self._served.held.discard_writer(opened)
            raise OSError(errno.ETIMEDOUT, refusal)
        close_all(closing)

    def begin(self, pace: Pace) -> Coroutine[Any, Any, None]:
        image, _, base = self._find()
        if base is not self._below or image is not self._image:
            raise RoomWanted
        return commit(self._top, base, pace, width=WIDTH, window=WINDOW)

    def finish(self) -> None:
        self._served.put_over(self._image, self._below, lambda: self._find()[2] is self._below)

    def leave(self) -> None:
        with self._served.device.keeping() as is_held:
            if not is_held or self._served.held.written_below is not self._below:
                return
            outcome: Future[str] = new_future()
            worker = self._served.device.worker
            worker.call(lambda: self._served.backend.retire(self._below, outcome.set_result))
            failure = worker.wait(outcome)
            try:
                self._served.held.share(self._below)
            except OSError as error:
                failure = failure or str(error)
        if failure:  # its content is whole all the same
            log.error("%s: is not closed cleanly: %s", self._below.file.path, failure)
