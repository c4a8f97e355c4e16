"""What went wrong with the image or the host, on one line."""

import errno
import logging
import os
from collections.abc import Callable
from time import monotonic

from qcow2 import ImageError
from qcow2.driver.file import HostFile
from qcow2.error import no_memory

AGAIN_SECONDS = 60.0
TOLD_MAX = 100  # texts in that time

log = logging.getLogger("vhost")


class Told:
    """What was told lately: each text is told once a minute for as long as it comes, so a later outage is told, too."""

    def __init__(self, now: Callable[[], float] = monotonic) -> None:
        self._now = now
        self._when: dict[str, float] = {}  # the oldest first

    def is_news(self, text: str) -> bool:
        """Whether *text* is to be told, which counts as told then."""
        now = self._now()
        while self._when and next(iter(self._when.values())) <= now - AGAIN_SECONDS:
            del self._when[next(iter(self._when))]
        if text in self._when or len(self._when) >= TOLD_MAX:
            return False
        self._when[text] = now
        return True


def describe(error: OSError | ImageError) -> str:
    """What is wrong with the image or the host, on one line."""
    if isinstance(error, OSError) and error.strerror:
        is_of_second = error.errno == errno.EEXIST and error.filename2 is not None  # of a link, which is to have it
        name = error.filename2 if is_of_second else error.filename
        return error.strerror if name is None else f"{name}: {error.strerror}"
    return str(error)


def problem_of(error: BaseException | None) -> str:
    """What went wrong, on one line; nothing if nothing did."""
    return "" if error is None else refusal_of(no_memory() if isinstance(error, MemoryError) else error)


def refusal_of(error: BaseException) -> str:
    """Why what was asked of the image was not done, on one line."""
    if isinstance(error, OSError | ImageError):
        return describe(error)
    if isinstance(error, ValueError):
        return str(error)
    raise error


def tell_of_lost_name(file: HostFile, path: str) -> None:
    """Say that *path* leads to another file than *file*, which a guest has written to, or to none."""
    if file.writable and not (os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(file.fd))):
        fate = "lost" if os.fstat(file.fd).st_nlink == 0 else "under that file's other name"
        log.warning("%s: leads no longer to the image that was served: what was written is %s", path, fate)
