"""Metadata written back as it reads: a sync of whoever wrote it may have failed (law 7).

The host tells of that once, and takes for written what it could not write: it reads as it should be, no sync tries
again, and the disk holds something older, until the page cache forgets. Restartable: nothing changes but the disk.
"""

from qcow2.driver.operation import Occupied, Read, Write
from qcow2.format.header import make_stable
from qcow2.judge.census import Census
from qcow2.plane.space import lacks_space
from qcow2.plane.tally import Role

STEP = 1 << 20  # bytes at a time


async def write_back(census: Census) -> None:
    """Let the disk hold all tables of an image that was not closed cleanly; stable on return.

    The header first: who dies in between, after a power loss too, leaves an image with a dirty bit. Raises: OSError.
    """
    await _write_back(census, 0, census.cluster_size)
    await make_stable(census.file)
    for cluster in census.tally.clusters(Role.SINGLE | Role.L2):
        try:
            await _write_back(census, cluster << census.record.cluster_bits, census.cluster_size)
        except OSError as error:
            if not lacks_space(error):  # a full host that copies on write: nothing is worse than it was
                raise
    await make_stable(census.file)


async def _write_back(census: Census, start: int, nbytes: int) -> None:
    """Write what is there again; a hole stays one, which a full disk has no room to fill."""
    at, end = start, min(start + nbytes, census.file_size)
    while at < end:
        is_data, length = await Occupied(census.file, at, min(end - at, STEP))
        if is_data:
            await Write(census.file, at, await Read(census.file, at, length))
        at += length
