"""Image files of this host, opened or made: locked, unless somebody says that sharing is fine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from qcow2.driver.far import FarFile
from qcow2.driver.file import HostFile, keep_access_time
from qcow2.driver.operation import File
from qcow2.driver.thread import undisturbed
from qcow2.error import ImageError
from qcow2.library.place import place_of
from qcow2.lock import ImageLocked, lock_image
from qcow2.node.gate import backing_path

_new: dict[str, HostFile] = {}  # what `created` has made, and its caller has not finished


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

    What a link leads to is made, and is what goes: the link stays.
    Raises: OSError, ImageLocked.
    """
    place = _end_of(path)
    if os.path.lexists(place):
        with opened(path, writable=True) as known:
            yield known
        return
    file: HostFile | None = None
    is_ours = True
    try:
        with undisturbed():  # an interrupt finds no file that nobody knows of
            file = _make(path, place)
            try:
                is_ours = _lock_new(file)
            except ImageLocked:  # somebody has opened it meanwhile, and fills it
                is_ours = False
                raise
            if is_ours:
                _new[place] = file
        yield file
    except BaseException:
        if file is not None and is_ours:
            _remove(file, place)
        raise
    finally:
        if file is not None:
            _new.pop(place, None)
            file.close()


def give_up_new() -> None:
    """For a process that dies: remove what `created` made right as a signal came, before its caller heard of it."""
    for place, file in list(_new.items()):  # other threads may go on
        with suppress(OSError):
            _remove(file, place)


def _end_of(path: str) -> str:
    """Where a link leads that leads to nothing yet; else *path*."""
    return os.path.realpath(path) if os.path.islink(path) and not os.path.exists(path) else path


def _make(path: str, place: str) -> HostFile:
    try:
        fd = os.open(place, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        error.filename = path
        raise
    keep_access_time(fd)
    return HostFile(path, fd, writable=True)


def _lock_new(file: HostFile) -> bool:
    """Lock it; whether nobody has filled it before. Raises: OSError, ImageLocked."""
    lock_image(file.fd, file.path, writable=True)
    return not file.size()


def _remove(file: HostFile, place: str) -> None:
    """Unless it has another name by now: what has its name is somebody else's then."""
    with suppress(FileNotFoundError):
        if os.path.samestat(os.lstat(place), os.fstat(file.fd)):
            os.unlink(place)


def are_one_file(path: str, other: str) -> bool:
    """Whether two paths lead to one file or device, or to parts of it that overlap; false if either leads to none."""
    if not (os.path.exists(path) and os.path.exists(other)):
        return False
    return place_of(path).overlaps(place_of(other))


def path_of_descriptor(fd: int) -> str:
    """A path that leads to the file of *fd*: its own, so that names relative to it are found, while it has one.

    Raises: OSError; TypeError for True and False, which are numbers as well, and meant as something else.
    """
    if isinstance(fd, bool):
        raise TypeError(f"{fd} is neither a path nor a file descriptor")
    status = os.fstat(fd)
    path = os.readlink(f"/proc/self/fd/{fd}")
    if os.path.exists(path) and os.path.samestat(os.stat(path), status):
        return path
    return f"/proc/self/fd/{fd}"


def reserve(file: HostFile, start: int = 0) -> None:
    """Have the host set space aside for all of *file* from *start* on. Raises: OSError."""
    nbytes = file.size() - start
    if nbytes > 0 and not file.is_device:
        try:
            os.posix_fallocate(file.fd, start, nbytes)
        except OSError as error:
            error.filename = file.path
            raise


MODES = {"r": False, "rb": False, "r+": True, "rb+": True, "r+b": True}


def is_writable(mode: str, writable: bool | None) -> bool:
    """What a mode of opening says. Raises: ValueError for one that makes no sense here."""
    known = MODES.get(mode)
    if known is None:
        raise ValueError(f"mode {mode!r} is not one of r, rb, r+, rb+; qcow2.create makes new images")
    return known if writable is None else writable


def is_same_file(one: File, other: File) -> bool:
    """Whether both are open on one file of this host, wherever their paths lead by now; or on one export."""
    assert isinstance(one, HostFile)
    assert isinstance(other, HostFile)
    if isinstance(one, FarFile) or isinstance(other, FarFile):
        return type(one) is type(other) and one.path == other.path
    return place_of(one.fd) == place_of(other.fd)


def is_at(file: File, path: str) -> bool:
    """Whether *path* leads to what *file* is open on, or to a part of it: what is written there changes that."""
    assert isinstance(file, HostFile)
    if isinstance(file, FarFile):
        return file.path == path
    return os.path.exists(path) and place_of(file.fd).overlaps(place_of(path))


def require_way(image: File, name: str, base: File) -> None:
    """Raises: ImageError unless what *image* would call *name* is *base*."""
    assert isinstance(image, HostFile)
    assert isinstance(base, HostFile)
    path = backing_path(image.path, name)
    if not (os.path.exists(path) and place_of(path) == place_of(base.fd)):
        raise ImageError(image.path, f"the backing file name {name!r} would not lead to {base.path}")
