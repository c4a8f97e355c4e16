"""`ctl stream`: the served image has itself what shows through it, and needs those it showed through no more."""

from collections.abc import Coroutine
from typing import Any

from qcow2.engine.image import Image
from qcow2.job.crew import BESIDE_A_GUEST, Windows
from qcow2.job.pace import Pace
from qcow2.job.stream import stream
from qcow2.node.node import Node
from vhost.job import Work
from vhost.servedchain import ServedChain


class Streaming(Work):
    """Pull what is above *base*, a file of the chain, into the served image; None: all that is below."""

    kind = "stream"

    def __init__(self, served: ServedChain, base: str | None) -> None:
        """*base* is as seen from the directory of the image.

        Raises: RoomWanted; ValueError, UnsupportedImage, OSError if that cannot be done.
        """
        served.require_free()
        self.about: dict[str, Any] = {"base": base}
        self._served = served
        self._base = base
        self._image, self._below = self._find()
        self._size = 0  # of the disk that was looked at

    def _find(self) -> tuple[Image, Node | None]:
        """The image that is served, and the base in its chain, as they are now."""
        image = self._served.image()
        if self._base is None:
            return image, None
        base = self._served.below(self._base)
        if image.backing is base:
            raise ValueError(f"{self._base}: is the backing file of {image.file.path} already")
        self._served.require_over(image, base)
        return image, base

    def begin(self, pace: Pace) -> Coroutine[Any, Any, None]:
        self._image, self._below = self._find()
        self._size = self._image.size
        return stream(self._image, self._below, pace, Windows(*BESIDE_A_GUEST))

    def finish(self) -> None:
        self._served.put_over(self._image, self._below, self._has_seen_all)

    def _has_seen_all(self) -> bool:
        """A disk that has grown meanwhile was not looked at to its end."""
        return self._image.size == self._size
