"""Keys of encrypted images: read once, kept out of swap and core dumps, never said."""

import ctypes
import logging
import mmap
import os
from collections.abc import Callable, Iterable
from io import FileIO

from virtio.block import Unavailable

MAX_KEY_BYTES = 64 << 10

log = logging.getLogger("vhost")


class Keys:
    """The content of files that hold a key each, as it is: a newline at the end is part of it."""

    def __init__(self, fds: Iterable[int], paths: Iterable[str], wait: Callable[[int], None] = lambda fd: None) -> None:
        """The *fds* are closed. *wait(fd)* is to return once a pipe, say, has something. Raises: Unavailable."""
        self._held = [_Held(_read(fd, f"--key-fd={fd}", wait)) for fd in fds]
        self._held += [_Held(_read(_open(path), f"--key-file={path}", wait)) for path in paths]

    def __bool__(self) -> bool:
        return bool(self._held)

    def __call__(self, path: str) -> list[bytearray]:
        """What may open the image at *path*, each of them to be tried: copies, the caller's to wipe."""
        return [held.copy() for held in self._held]


class _Held:
    """One key in pages of its own, which no core dump has; not swapped if we may say so."""

    def __init__(self, content: bytearray) -> None:
        """*content* is wiped."""
        self._nbytes = len(content)
        self._pages = mmap.mmap(-1, max(1, len(content)), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._pages.madvise(mmap.MADV_DONTDUMP)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))
        if ctypes.CDLL(None).mlock(ctypes.c_void_p(address), ctypes.c_size_t(len(self._pages))) < 0:
            log.warning("a key is not locked in memory, and may be swapped: see RLIMIT_MEMLOCK")
        self._pages[: len(content)] = content
        content[:] = bytes(len(content))

    def copy(self) -> bytearray:
        with memoryview(self._pages) as pages:
            return bytearray(pages[: self._nbytes])


def _open(path: str) -> int:
    """At once, also a FIFO that nobody writes to yet."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        raise Unavailable(f"--key-file={path}: {error.strerror}") from error


def _take(file: FileIO, view: memoryview, wait: Callable[[int], None]) -> int:
    """The next bytes, 0 at the end of *file* or *view*."""
    nbytes = None
    while nbytes is None:
        wait(file.fileno())
        nbytes = file.readinto(view)
    return nbytes


def _read(fd: int, option: str, wait: Callable[[int], None]) -> bytearray:
    content, end = bytearray(MAX_KEY_BYTES + 1), 0
    try:
        with open(fd, "rb", buffering=0) as file, memoryview(content) as view:
            while nbytes := _take(file, view[end:], wait):
                end += nbytes
    except OSError as error:
        raise Unavailable(f"{option}: {error.strerror}") from error
    if not 0 < end <= MAX_KEY_BYTES:
        raise Unavailable(f"{option}: holds {'no key' if not end else f'more than {MAX_KEY_BYTES} bytes'}")
    key = content[:end]
    content[:end] = bytes(end)
    return key
