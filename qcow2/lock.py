"""Byte-range locks on image files, the ones QEMU takes: nobody changes an image under us, nor we under others.

Byte 100 + n says "I use permission n", byte 200 + n "nobody else may". A process takes shared locks on the bytes of
what it does and does not tolerate, then looks whether anybody holds the opposite byte. Open file description locks:
they belong to the descriptor and end with it.
"""

import errno
import fcntl
import struct
import time
from enum import IntEnum

USES = 100
FORBIDS = 200
PATIENCE = 1.0  # seconds
RETRY_INTERVAL = 0.01
FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid; this machine's alignment


class Permission(IntEnum):
    """What one may do to an image; QEMU's numbers and, lower-cased, its words."""

    CONSISTENT_READ = 0
    WRITE = 1
    RESIZE = 3


NAMES = {Permission.CONSISTENT_READ: "consistent read", Permission.WRITE: "write", Permission.RESIZE: "resize"}
FORBIDDEN = (Permission.WRITE, Permission.RESIZE)  # what we let nobody do


class ImageLocked(OSError):
    """Another process uses the image in a way that excludes us."""


def lock_image(fd: int, path: str, *, writable: bool) -> None:
    """Lock the open image for as long as *fd* is open.

    Who is refused tries again for `PATIENCE` seconds: a process that was killed keeps its locks until the kernel has
    ended its io_uring transfers, up to 90 ms later as seen on Linux 6.18, and until then it may still write.

    Raises: ImageLocked, naming the file; OSError if the host cannot lock.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            _try_to_lock(fd, path, writable=writable)
        except ImageLocked:
            _release(fd)  # or two who wait would wait for each other
            if time.monotonic() >= deadline:
                raise
            time.sleep(RETRY_INTERVAL)
        else:
            return


def _try_to_lock(fd: int, path: str, *, writable: bool) -> None:
    used = tuple(Permission) if writable else (Permission.CONSISTENT_READ,)
    for permission in used:
        _take(fd, path, USES + permission, permission)
    for permission in FORBIDDEN:
        _take(fd, path, FORBIDS + permission, permission)
    for permission in used:
        if _is_held(fd, FORBIDS + permission):
            raise _locked(path, f'Failed to get "{NAMES[permission]}" lock')
    for permission in FORBIDDEN:
        if _is_held(fd, USES + permission):
            raise _locked(path, f'Failed to get shared "{NAMES[permission]}" lock')


def _release(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_UNLCK, 0, USES, FORBIDS - USES + max(Permission) + 1, 0))


def _locked(path: str, what: str) -> ImageLocked:
    return ImageLocked(errno.EAGAIN, f"{what}: is another process using the image?", path)


def _take(fd: int, path: str, byte: int, permission: Permission) -> None:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_RDLCK, 0, byte, 1, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise _locked(path, f'Failed to lock "{NAMES[permission]}"') from error
        raise


def _is_held(fd: int, byte: int) -> bool:
    """Whether another open file description holds a lock on *byte*."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0))
    kind: int = FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK
