"""Copies that a backup or mirror has left beside the image as its process was killed: told of once each."""

import logging
import os
from contextlib import suppress

from qcow2.node.leftover import copies_left

log = logging.getLogger("vhost")


class LeftCopies:
    """Nobody else looks for hidden files."""

    def __init__(self) -> None:
        self._known: set[str] = set()  # that were told of, or that a job here has made

    def know(self, path: str) -> None:
        """A job here makes the copy *path*, and says itself if it has to leave it."""
        self._known.add(_real(path))

    def tell(self, image_path: str) -> None:
        """Name those beside the image that are new."""
        with suppress(OSError):
            for path in copies_left(image_path):
                if _real(path) not in self._known:
                    log.warning("%s: was left by a backup or mirror, and is in nobody's use", path)
                self._known.add(_real(path))


def _real(path: str) -> str:
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
