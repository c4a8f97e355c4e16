"""The second descriptor of an image's file, which bypasses the page cache."""

import errno
import logging
import os
from contextlib import ExitStack

from qcow2 import Disk
from qcow2.driver.file import HostFile, keep_access_time
from qcow2.lock import lock_transfers

PAGE = 4096

log = logging.getLogger("vhost")


def shares_pages(disk: Disk, file: HostFile) -> bool:
    """Whether data and tables lie in one page, which must not be written by O_DIRECT and through the cache."""
    image = disk.image
    nbytes = image.capabilities.cluster_size
    if not (file is disk.files[0] and file.writable and nbytes):
        return False
    if nbytes < PAGE:
        log.warning("%s: clusters of %d bytes, less than a page: through the page cache", file.path, nbytes)
    return nbytes < PAGE


def open_all_direct(files: list[HostFile]) -> dict[HostFile, int]:
    """A second descriptor of each file that bypasses the page cache, the caller's to close.

    Raises: OSError naming the file whose file system cannot do that.
    """
    with ExitStack() as opened:
        descriptors = {}
        for file in files:
            descriptors[file] = open_direct(file)
            keep_access_time(descriptors[file])
            opened.callback(os.close, descriptors[file])
            lock_transfers(descriptors[file], file.path, writable=file.writable)
        opened.pop_all()
        return descriptors


def open_direct(file: HostFile) -> int:
    access = os.O_RDWR if file.writable else os.O_RDONLY
    try:
        return _reopen(file, access | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        message = f"cannot be opened with O_DIRECT, as this --cache mode needs: {error.strerror}"
        raise OSError(error.errno, message, file.path) from None


def _reopen(file: HostFile, flags: int) -> int:
    """Open once more what *file* is, whatever its name leads to now; without a /proc, what it still names."""
    try:
        return os.open(f"/proc/self/fd/{file.fd}", flags)
    except FileNotFoundError:
        fd = os.open(file.path, flags)
    if not os.path.samestat(os.fstat(fd), os.fstat(file.fd)):
        os.close(fd)
        raise OSError(errno.ESTALE, "another file has this name by now", file.path)
    return fd
