"""Where a backup goes, and files among that: one that nobody takes for a disk before it is whole and stable."""

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import qcow2
from qcow2 import ImageError
from qcow2.driver.file import BlockingDriver, HostFile, run
from qcow2.engine.create import Options
from qcow2.engine.encryption import Keyring
from qcow2.engine.image import Image
from qcow2.engine.opened import OpenOptions
from qcow2.error import UnsupportedImage
from qcow2.job.content import SPARSE_UNIT, data_runs
from qcow2.job.newimage import NewImage
from qcow2.job.target import MAGIC, InNew, InPlace, Target, create_all_but_magic
from qcow2.library.hostfile import is_at
from qcow2.lock import lock_image
from qcow2.node.leftover import give_name, hidden, require_copy_left, require_lasting_name, require_ours
from qcow2.node.node import Node
from qcow2.node.overlay import leads_to, sync_directory
from qcow2.node.raw import RawImage
from vhost.frozen import Saved
from vhost.problem import describe


class BackupTarget(ABC):
    """What is at *path* becomes a disk. One thread at a time uses it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._driver = BlockingDriver()

    def begin(self) -> None:  # noqa: B027
        """The disk is frozen: what is at *path* may be overwritten from now on. Raises: OSError, ImageError."""

    @abstractmethod
    def _begun(self) -> Target:
        """What is written to, begun. Raises: OSError, and it may be tried again; ImageError, Cancelled."""

    def put(self, saved: Saved) -> None:
        """Store it. Raises: OSError, and it may be tried again; ImageError, and it may not; Cancelled."""
        target = self._begun()
        if saved.data is not None:
            runs = data_runs(saved.data, SPARSE_UNIT)
            if saved.place is None:
                saved.place = target.place(saved.guest_offset, saved.nbytes, runs, None)
            self._driver.run(target.put(saved.guest_offset, saved.data, runs, saved.place))
        elif saved.nbytes:
            self._zero(target, saved)
        else:
            self._finally(target.advance(saved.guest_offset))

    def _zero(self, target: Target, saved: Saved) -> None:
        self._finally(target.zero(saved.guest_offset, saved.nbytes))

    def finish(self) -> None:
        """All has been stored: let it be a disk, stable. Raises: OSError, ImageError."""
        self._finally(self._begun().finish())

    def _finally(self, step: Any) -> None:
        """What cannot be done a second time. Raises: ImageError."""
        try:
            self._driver.run(step)
        except OSError as error:
            raise ImageError(self.path, describe(error)) from error

    def abort(self) -> None:  # noqa: B027
        """For any thread: let who waits for another host wait no more. Does not wait itself."""

    @abstractmethod
    def close(self) -> None:
        """Close it; what is not whole is no disk. Raises: OSError."""


class BackupFile(BackupTarget):
    """The file *path*, which becomes a disk.

    A new one is made as `.NAME.backup` beside it, and gets its name once it is whole. One that *exists* is overwritten;
    of a raw one the first bytes come last. A death leaves no disk. Before `begin` nothing that exists is changed.
    """

    def __init__(
        self,
        path: str,
        options: Options,
        image_format: str,
        *,
        exists: bool,
        is_increment: bool = False,
        keys: Keyring | None,
        allow_files: Iterable[str] | None = None,
    ) -> None:
        """The size, the qcow2 image under it and the encryption are those of *options*; *keys* open both images.

        *is_increment*: it holds what has changed, and replaces no image that exists.
        What the one under it names lies beneath *allow_files*, if they are given, or beside it.
        Raises: OSError, ImageError, ValueError.
        """
        super().__init__(path)
        if not exists:
            require_lasting_name(path)
        self._made = None if exists else hidden(path, "backup")
        self._target: Target | None = None
        with ExitStack() as stack:
            below = None
            if options.backing_name is not None:
                name = os.path.join(os.path.dirname(path), options.backing_name)
                if allow_files is not None:
                    allow_files = [*allow_files, os.path.dirname(os.path.realpath(name))]
                disk = stack.enter_context(qcow2.open(name, key=keys, allow_files=allow_files))
                disk.chain.require_room()
                if any(is_at(file, path) for file in disk.files):
                    raise ValueError(f"{path}: is a file of the backup before, which this one is over")
                below = disk.image
            if self._made is not None:
                if os.path.lexists(path):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
                require_ours(self._made)
            self._file = stack.enter_context(_opened(path) if self._made is None else _made(self._made, image_format))
            stack.callback(self._remove)
            if is_increment and self._made is None:
                _require_no_image(self._file)
            if image_format == "raw" and self._file.is_device and self._file.size() < options.size:
                raise ImageError(path, f"the device has {self._file.size()} bytes, the disk {options.size}")
            self._of_format = partial(self._format, image_format, options, below, keys)
            if self._made is not None:  # nobody's yet; and no guest waits for what it takes
                self.begin()
            self._closing = stack.pop_all()

    def begin(self) -> None:
        """As of a `BackupTarget`; the passphrase of its options is needed here last."""
        if self._target is None:
            target = self._of_format()
            self._driver.run(target.begin())
            self._target = target

    def _format(self, image_format: str, options: Options, below: Node | None, keys: Keyring | None) -> Target:
        file, size = self._file, options.size
        if options.encryption is not None:
            header = run(create_all_but_magic(file, options))
            image = run(Image.open(file, backing=below, options=OpenOptions(writable=True, keys=keys), header=header))
            return InNew(file, image, size, is_zero=below is None)
        if image_format == "qcow2":
            return NewImage(file, options, below, reads_zeros=not file.is_device)
        if not file.is_device:
            file.set_length(0)
        return InPlace(RawImage(file, size, read_only=False), size, is_zero=not file.is_device, length=size)

    def _begun(self) -> Target:
        assert self._target is not None
        return self._target

    def finish(self) -> None:
        """All has been stored: let it be a disk of that name, stable. Raises: OSError, ImageError.

        What is whole stays, and an error says where: its name may be taken by now, say.
        """
        super().finish()
        if self._made is None:
            return
        made, self._made = self._made, None
        if not leads_to(made, self._file):
            raise ImageError(made, "the backup has been moved or removed")
        try:
            give_name(made, self.path)
            sync_directory(self.path)
            if leads_to(made, self._file):
                os.unlink(made)
        except OSError as error:
            self._unname(made)
            raise ImageError(made, f"the backup is whole, and stays under this name: {describe(error)}") from error

    def _unname(self, made: str) -> None:
        """What failed is not to be taken for a backup that has not."""
        with suppress(OSError):
            if leads_to(self.path, self._file):
                if not leads_to(made, self._file):
                    give_name(self.path, made)
                if leads_to(made, self._file) and leads_to(self.path, self._file):
                    os.unlink(self.path)

    def close(self) -> None:
        """Close the file; one that was made and is not whole is gone. Raises: OSError."""
        self._closing.close()

    def _remove(self) -> None:
        if self._made is not None:
            with suppress(FileNotFoundError):  # others have removed it
                os.unlink(self._made)


def _opened(path: str) -> HostFile:
    """Raises: OSError, ImageLocked."""
    return _locked(HostFile.open(path, writable=True))


def _require_no_image(file: HostFile) -> None:
    """A bitmap may have forgotten what is in it, also one that is to be kept. Raises: OSError, UnsupportedImage."""
    if os.pread(file.fd, len(MAGIC), 0) == MAGIC:
        way = "clear its start (blkdiscard -z -l 64KiB)" if file.is_device else "remove it"
        raise UnsupportedImage(file.path, f"holds an image: an increment replaces none; {way} or name another")


def _made(path: str, image_format: str) -> HostFile:
    """The file *path*, or what a process that died left there. Raises: OSError, ImageLocked."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    file = _locked(HostFile(path, os.open(path, flags, 0o600), writable=True))
    try:
        require_copy_left(file, path, image_format)
        if os.fstat(file.fd).st_nlink == 1 and os.path.samestat(os.fstat(file.fd), os.lstat(path)):
            return file
        os.unlink(path)  # it has its name, and was to lose this one
        again = _locked(HostFile(path, os.open(path, flags | os.O_EXCL, 0o600), writable=True))
    except BaseException:
        file.close()
        raise
    file.close()
    return again


def _locked(file: HostFile) -> HostFile:
    try:
        lock_image(file.fd, file.path, writable=True)
    except BaseException:
        file.close()
        raise
    return file
