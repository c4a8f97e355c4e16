"""The in-flight region as it is made for a front-end to keep, and the note about the write cache that it carries.

Behind the parts of the rings, which the specification describes, a region of ours has a record of our own: the write
cache that the guest chose. QEMU tells its back-end once and never again, not even the next daemon; but it keeps the
region over reconnections, and frees it when the guest is reset. A region that another back-end made has no such record.
"""

import contextlib
import fcntl
import os
import struct

from ring.inflight import InflightRegion, inflight_nbytes
from ring.memory import close_shared

RING_ENTRIES = 1024  # QEMU's VIRTQUEUE_MAX_SIZE
MAGIC = b"vuqcow2\0"
OFFSET_MAX = (1 << 63) - 1 - 64
NOTE = struct.Struct("=8sB55x")  # MAGIC, wce; a cache line
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL  # nobody can take it away under us


def create(num_queues: int, queue_size: int, *, packed: bool, wce: bool) -> tuple[int, int]:
    """Make a region that nobody used yet -> its fd, which is the caller's, and its size.

    It has room for rings of `RING_ENTRIES` at least: QEMU asks before it knows them, and has larger ones than it says.
    """
    nbytes = inflight_nbytes(num_queues, max(queue_size, RING_ENTRIES), packed=packed)
    fd = os.memfd_create("in-flight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, fd)
        os.truncate(fd, nbytes + NOTE.size)
        os.pwrite(fd, NOTE.pack(MAGIC, wce), nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        undo.pop_all()
    return fd, nbytes + NOTE.size


class WriteCacheNote:
    """The note in one region; holds an fd of its own until `close`."""

    def __init__(self, region: InflightRegion) -> None:
        """Look for the note of *region*, whose fd is only borrowed."""
        self._at = region.mmap_offset + region.nbytes - NOTE.size
        self._fd = os.dup(region.fd)
        self.wce = self._read()  # None: there is none

    @property
    def nbytes(self) -> int:
        """How many bytes of the region's end are the note's."""
        return 0 if self.wce is None else NOTE.size

    def close(self) -> None:
        close_shared(self._fd)

    def write(self, wce: bool) -> None:
        """Change the note; a region without one stays as it is."""
        if self.wce is not None:
            os.pwrite(self._fd, NOTE.pack(MAGIC, wce), self._at)
            self.wce = wce

    def _read(self) -> bool | None:
        if not 0 <= self._at <= OFFSET_MAX:
            return None  # the front-end's numbers, which no file has
        try:
            magic, wce = NOTE.unpack(os.pread(self._fd, NOTE.size, self._at))
        except (OSError, struct.error):
            return None  # cut short, or a file that can only be mapped
        return bool(wce) if magic == MAGIC and wce in (0, 1) else None
