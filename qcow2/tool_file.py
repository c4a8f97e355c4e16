"""Opening image files for the tool: locked, unless the user says that sharing is fine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from qcow2.driver.file import HostFile
from qcow2.lock import lock_image


@contextmanager
def opened(path: str, *, writable: bool = False, force_share: bool = False) -> Iterator[HostFile]:
    """The image file at *path*, locked as QEMU would; with *force_share* read it though others may write.

    Raises: OSError, ImageLocked.
    """
    with HostFile.open(path, writable=writable) as file:
        if not force_share:
            lock_image(file.fd, path, writable=writable)
        yield file


@contextmanager
def created(path: str) -> Iterator[HostFile]:
    """The file at *path*, made if there is none, locked, with its old content; after an error a new one is gone again.

    Raises: OSError, ImageLocked.
    """
    is_new = not os.path.lexists(path)
    if is_new:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
    try:
        with opened(path, writable=True) as file:
            yield file
    except BaseException:
        if is_new:
            os.unlink(path)
        raise
