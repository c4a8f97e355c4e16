"""What a worker has to know of the files of a held image, and who may still read from them."""

import errno
import os
import threading
from collections.abc import Callable, Collection
from functools import partial

from qcow2 import Disk
from qcow2.driver.file import HostFile
from qcow2.lock import await_transfers, guest_key, lock_transfers, share_image
from ring.files import FILES_MAX, look_at
from ring.native import Pointer
from vhost.direct import open_all_direct, open_direct, shares_pages


class HeldFiles:
    """Second descriptors, which bypass the page cache if that is wanted, and traits; a worker reads both meanwhile."""

    def __init__(self, *, are_direct: bool, on_wait: Callable[[], None]) -> None:
        """*on_wait()* may raise while a dead daemon's reads are awaited."""
        self.direct_fds: dict[HostFile, int] = {}
        self.traits: dict[HostFile, Pointer] = {}
        self.are_direct = are_direct
        self._on_wait = on_wait
        self._lock = threading.Lock()  # of changes of the two: workers and jobs add and forget
        self._memory: set[tuple[int, int]] = set()  # of the guest, files by device and inode

    def add_disk(self, disk: Disk) -> None:
        """All of *disk*, which was opened just now. Raises: OSError; then some are known, to be forgotten."""
        if self.are_direct:
            files = [file for file in disk.files if not shares_pages(disk, file)]
            self._know_direct(open_all_direct(files))
        for file in disk.files:
            self._look_at(file)

    def add_written(self, file: HostFile, *, is_direct: bool) -> None:
        """One that is about to be written. Raises: OSError; then it may be known, to be forgotten."""
        if is_direct:
            fd = open_direct(file)
            self._know_direct({file: fd})
            lock_transfers(fd, file.path, writable=True)
        self._look_at(file)

    def _know_direct(self, fds: dict[HostFile, int]) -> None:
        with self._lock:
            self.direct_fds = {**self.direct_fds, **fds}

    def _look_at(self, file: HostFile) -> None:
        if len(self.traits) >= FILES_MAX:  # found out by the worker it would be too late to refuse
            raise OSError(
                errno.EMFILE, f"with it more than {FILES_MAX} files would be served: commit or stream first", file.path
            )
        traits = look_at(file.fd, self.direct_fds.get(file, -1))
        with self._lock:
            self.traits = {**self.traits, file: traits}

    def admit(self, memory: set[tuple[int, int]], new: set[tuple[int, int]], disks: Collection[Disk]) -> None:
        """Return once no daemon that died reads from *disks* into what is *new* of the guest's *memory*.

        Both are files by device and inode. Raises: OSError.
        """
        self._memory = memory
        for disk in disks:
            self._await_reads(disk.files[0], disk.files, new)

    def admit_all(self, top: HostFile, files: Collection[HostFile]) -> None:
        """The same for *files*, which are or will be under *top*, and all memory. Raises: OSError."""
        self._await_reads(top, files, self._memory)

    def _await_reads(self, top: HostFile, files: Collection[HostFile], memory: Collection[tuple[int, int]]) -> None:
        for file in files:
            if (fd := self.direct_fds.get(file, -1)) >= 0:
                status = os.fstat(top.fd)
                for key in (guest_key(numbers, (status.st_dev, status.st_ino)) for numbers in memory):
                    await_transfers(fd, file.life_fd, file.path, key, self._on_wait)

    def descriptors(self, file: HostFile) -> list[int]:
        """All that *file* is read with."""
        return [file.fd, *([self.direct_fds[file]] if file in self.direct_fds else [])]

    def share(self, files: Collection[HostFile]) -> None:
        """Let others read *files*, which were written. Raises: OSError."""
        for file in files:
            for fd in self.descriptors(file):
                share_image(fd)

    def forget(self, files: Collection[HostFile]) -> list[Callable[[], None]]:
        """No worker has them. -> what closes their second descriptors."""
        with self._lock:
            gone = [fd for file, fd in self.direct_fds.items() if file in files]
            self.direct_fds = {file: fd for file, fd in self.direct_fds.items() if file not in files}
            self.traits = {file: traits for file, traits in self.traits.items() if file not in files}
        return [partial(os.close, fd) for fd in gone]
