"""Byte-range locks on image files, the ones QEMU takes: nobody changes an image under us, nor we under others.

Byte 100 + n says "I use permission n", byte 200 + n "nobody else may". A process takes shared locks on the bytes of
what it does and does not tolerate, then looks whether anybody holds the opposite byte. Open file description locks:
they belong to the description and end with it, which transfers in flight keep alive: so a description that carries
O_DIRECT transfers has the locks, too, or they would outlive them.

Bytes of our own, beyond QEMU's, tell a process that died from one that lives. `OURS` is held by each description that
may carry transfers, `LIVES` + its process's number by one that never does: it ends with its process. One that was
killed ends late if a thread of its waits for storage that hangs, so whoever finds its number asks whether it was.
"""

import errno
import fcntl
import os
import signal
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import IntEnum

USES = 100
FORBIDS = 200
OURS = 300
LIVES = 1 << 41  # from here on, one for each process
GUESTS, GUESTS_LIVE = 1 << 40, 1 << 60  # from here on: the same two for each guest
PROCESSES = 1 << 22  # as many as Linux numbers
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


def lock_image(fd: int, path: str, *, writable: bool, on_wait: Callable[[], None] = lambda: None) -> None:
    """Lock the open image for as long as *fd* is open.

    Who is refused tries again for `PATIENCE` seconds: a process that was killed keeps its locks until the kernel has
    ended its transfers, and until then it may still write. If a process of ours did that, and none lives, for as long
    as it takes: a slow disk is no reason to give up, and nobody else could go on either. *on_wait* is called meanwhile.

    Raises: ImageLocked, naming the file; OSError if the host cannot lock.
    """
    deadline = time.monotonic() + PATIENCE
    is_told = False
    while True:
        is_late = time.monotonic() >= deadline
        is_worth_it = is_late and is_of_the_dead(fd, path)  # asked first: what ends meanwhile we then get
        try:
            return _try_to_lock(fd, path, writable=writable)
        except ImageLocked:
            _release(fd)  # or two who wait would wait for each other
            if is_late and not is_worth_it:
                raise
        if is_worth_it and not is_told:
            _tell_who_waits(path, "transfers")
            is_told = True
        on_wait()
        time.sleep(RETRY_INTERVAL)


def unlock(fd: int) -> None:
    """Give all locks back, though others have a copy of *fd*, as children of a fork do; no transfer is under way."""
    with suppress(OSError):  # a host without locks
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_UNLCK, 0, 0, 0, 0))


def share_image(fd: int) -> None:
    """Keep of a writer's locks what a reader has. Raises: OSError."""
    for permission in (Permission.WRITE, Permission.RESIZE):
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_UNLCK, 0, USES + permission, 1, 0))


def let_write(fd: int, path: str, readers: Sequence[int]) -> None:
    """Lock the open image for writing beside *readers*, descriptions of our own, which forbid that no more then.

    At no moment may anybody else write. Raises: ImageLocked, OSError; the readers have what they had.
    """
    _try_to_lock(fd, path, writable=False)
    for reader in readers:
        _allow(reader)
    try:
        _try_to_lock(fd, path, writable=True)
    except OSError:
        be_read_again(readers)
        raise


def be_read_again(readers: Sequence[int]) -> None:
    """Let *readers* forbid writing again, while the description that wrote still does. Raises: OSError."""
    for reader in readers:
        for permission in FORBIDDEN:
            _share(reader, "", FORBIDS + permission)


def _allow(fd: int) -> None:
    for permission in FORBIDDEN:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_UNLCK, 0, FORBIDS + permission, 1, 0))


def is_written(fd: int, path: str) -> bool:
    """Whether others have the image open to write to it. Raises: OSError if the host cannot tell."""
    return _is_held(fd, path, USES + Permission.WRITE)


def is_of_the_dead(fd: int, path: str) -> bool:
    """Whether transfers of a process of ours that died are under way, and none lives."""
    return _is_held(fd, path, OURS) and not _has_the_living(fd, path, LIVES)


def _has_the_living(fd: int, path: str, first: int) -> bool:
    """Whether another description marks a life from byte *first* on, of a process that was not killed."""
    marks = _held(fd, path, first, first + PROCESSES)
    return any(not was_killed(mark - first) and _is_held(fd, path, mark) for mark in marks)  # still


def was_killed(pid: int) -> bool:
    """Whether the process has ended but for threads that the kernel cannot end yet.

    False of one that we cannot see, as from another container.
    """
    try:
        with open(f"/proc/{pid}/status") as file:
            status = dict(line.rstrip("\n").split(":\t", 1) for line in file)
    except OSError:
        return False
    pending = int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)
    return status["State"].startswith(("Z", "X")) or bool(pending & 1 << signal.SIGKILL - 1)


def show_life(path: str, fd: int) -> int:
    """Say that we live, for as long as what is returned, a description of the image in *fd* for nothing else, is open.

    Raises: OSError.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        life = os.open(f"/proc/self/fd/{fd}", flags)
    except FileNotFoundError:
        life = os.open(path, flags)
    try:
        if os.path.samestat(os.fstat(life), os.fstat(fd)):  # else there is no /proc, and the name leads elsewhere now
            _share(life, path, LIVES + os.getpid())
            _share(fd, path, OURS)
    except OSError:
        os.close(life)
        raise
    return life


def lock_transfers(fd: int, path: str, *, writable: bool) -> None:
    """Let the locks that we hold last until the last transfer by another description, *fd*, has ended."""
    used = tuple(Permission) if writable else (Permission.CONSISTENT_READ,)
    for byte in (OURS, *(USES + permission for permission in used), *(FORBIDS + each for each in FORBIDDEN)):
        _share(fd, path, byte)


def guest_key(memory: tuple[int, int], image: tuple[int, int]) -> int:
    """The number of a byte that stands for a guest's memory and its disk, both files by device and inode."""
    return zlib.crc32(repr((memory, image)).encode())


def await_transfers(fd: int, life_fd: int, path: str, key: int, on_wait: Callable[[], None]) -> None:
    """Return once nobody who died has transfers for the guest of *key* under way; then *fd* may have some.

    A daemon that died may still be reading into that memory, which the guest uses for something else by now. One that
    lives does no harm: a guest may have a disk twice.
    """
    is_told = False
    lives = GUESTS_LIVE + key * PROCESSES
    while _is_held(fd, path, GUESTS + key) and not _has_the_living(life_fd, path, lives):
        if not is_told:
            _tell_who_waits(path, "reads")
            is_told = True
        on_wait()
        time.sleep(RETRY_INTERVAL)
    _share(life_fd, path, lives + os.getpid())
    _share(fd, path, GUESTS + key)


def _try_to_lock(fd: int, path: str, *, writable: bool) -> None:
    used = tuple(Permission) if writable else (Permission.CONSISTENT_READ,)
    for permission in used:
        _take(fd, path, USES + permission, permission)
    for permission in FORBIDDEN:
        _take(fd, path, FORBIDS + permission, permission)
    for permission in used:
        if _is_held(fd, path, FORBIDS + permission):
            raise _locked(path, f'Failed to get "{NAMES[permission]}" lock')
    for permission in FORBIDDEN:
        if _is_held(fd, path, USES + permission):
            raise _locked(path, f'Failed to get shared "{NAMES[permission]}" lock')


def _release(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_UNLCK, 0, USES, FORBIDS - USES + max(Permission) + 1, 0))


def _locked(path: str, what: str) -> ImageLocked:
    return ImageLocked(errno.EAGAIN, f"{what}: is another process using the image?", path)


def _take(fd: int, path: str, byte: int, permission: Permission) -> None:
    try:
        _share(fd, path, byte)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise _locked(path, f'Failed to lock "{NAMES[permission]}"') from error
        raise


def _share(fd: int, path: str, byte: int) -> None:
    """Hold a shared lock on *byte*. Raises: OSError that says it is about locks."""
    with _about_locks(path):
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_RDLCK, 0, byte, 1, 0))


@contextmanager
def _about_locks(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise
        message = f"cannot be locked; does its file system have byte-range locks?: {error.strerror}"
        raise OSError(error.errno, message, path) from error


def _is_held(fd: int, path: str, byte: int) -> bool:
    """Whether another open file description holds a lock on *byte*."""
    return any(True for _ in _held(fd, path, byte, byte + 1))


def _held(fd: int, path: str, start: int, end: int) -> Iterator[int]:
    """The bytes from *start* to *end* that other open file descriptions hold locks on."""
    if start == end:
        return
    with _about_locks(path):
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, FLOCK.pack(fcntl.F_WRLCK, 0, start, end - start, 0))
    kind, _, first, nbytes, _ = FLOCK.unpack(answer)
    if kind == fcntl.F_UNLCK:
        return
    held = range(max(first, start), min(first + nbytes, end) if nbytes else end)  # any of them, not the first
    yield from held
    yield from _held(fd, path, start, held.start)
    yield from _held(fd, path, held.stop, end)


def _tell_who_waits(path: str, what: str) -> None:
    import logging  # which takes longer than most locks

    logging.getLogger("qcow2").warning("%s: waiting for the last %s of a process that died", path, what)
