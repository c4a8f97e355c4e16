"""The in-flight region as it is made for a front-end to keep, and the note about the write cache that it carries.

Behind the parts of the rings, which the specification describes, a region of ours has a record of our own: the write
cache that the guest chose. QEMU tells its back-end once and never again, not even the next daemon; but it keeps the
region over reconnections, and frees it when the guest is reset. A region that another back-end made has no such record.

The record also holds for how many entries the region was made, which is for the largest ring there may be, whatever was
asked: QEMU 8 to 10 asks for its `queue-size`, and lets the driver set up rings of up to 1024 entries all the same.
"""

import contextlib
import fcntl
import os
import struct
from dataclasses import replace

from ring.inflight import MAX_ENTRIES, InflightRegion, inflight_nbytes

MAGIC = b"vuqcow2\0"
NOTE = struct.Struct("=8sBxH52x")  # MAGIC, wce, entries of a part (0: as many as were asked for); a cache line
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL  # nobody can take it away under us


def create(num_queues: int, queue_size: int, *, packed: bool, wce: bool) -> tuple[int, int]:
    """Make a region that nobody used yet -> its fd, which is the caller's, and its size."""
    nbytes = inflight_nbytes(num_queues, queue_size, packed=packed)
    fd = os.memfd_create("in-flight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, fd)
        os.truncate(fd, nbytes + NOTE.size)
        os.pwrite(fd, NOTE.pack(MAGIC, wce, queue_size), nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        undo.pop_all()
    return fd, nbytes + NOTE.size


class Note:
    """Our record at the end of *region*, if it has one; holds an fd of its own until `close`."""

    def __init__(self, region: InflightRegion) -> None:
        """The fd of *region* is only borrowed."""
        self.region = region  # with the entries that it was made for
        self.wce: bool | None = None  # None: there is no record
        self._at = region.mmap_offset + region.nbytes - NOTE.size
        self._fd = os.dup(region.fd)
        self._read()

    def close(self) -> None:
        os.close(self._fd)

    def write(self, wce: bool) -> None:
        """Change the write cache noted; a region without a record stays as it is."""
        if self.wce is not None:
            os.pwrite(self._fd, NOTE.pack(MAGIC, wce, self.region.queue_size), self._at)
            self.wce = wce

    def _read(self) -> None:
        try:
            magic, wce, entries = NOTE.unpack(os.pread(self._fd, NOTE.size, self._at))
        except (OSError, OverflowError, struct.error):
            return  # cut short, a place that no file has, or a file that can only be mapped
        if magic != MAGIC or wce not in (0, 1):
            return
        made_for = replace(self.region, queue_size=entries or self.region.queue_size)
        parts = inflight_nbytes(made_for.num_queues, made_for.queue_size, packed=made_for.packed)
        if made_for.queue_size <= MAX_ENTRIES and parts + NOTE.size <= made_for.nbytes:
            self.region, self.wce = made_for, bool(wce)
