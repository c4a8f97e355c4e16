"""A file before there is any image in it: emptied, as long as it shall be, with or without its space."""

from enum import Enum

from qcow2.driver.operation import File, Resize, Size, Sync, Write, Zero

ZERO_PIECE = bytes(1 << 20)


class Preallocation(Enum):
    """How much of the disk exists before the guest writes."""

    OFF = "off"
    METADATA = "metadata"  # every cluster mapped, the file sparse
    FALLOC = "falloc"  # and its space reserved
    FULL = "full"  # and written with zeros


async def empty(file: File, nbytes: int) -> None:
    """Let *file* be empty, if it can have *nbytes*; a device keeps what it has. Raises: OSError; it is there then."""
    if await Size(file):
        await Resize(file, nbytes)
    await Resize(file, 0)


async def write_raw(file: File, size: int, preallocation: Preallocation) -> None:
    """Make a raw image of *size* bytes of whatever *file* holds; stable on return."""
    await empty(file, size)
    await Zero(file, 0, size)  # a device's
    await Resize(file, size)
    if preallocation is Preallocation.FULL:
        await write_zeros(file, 0, size)
    await Sync(file)


async def write_zeros(file: File, start: int, end: int) -> None:
    """Zeros that take their space. Raises: OSError."""
    for host_offset in range(start, end, len(ZERO_PIECE)):
        await Write(file, host_offset, memoryview(ZERO_PIECE)[: end - host_offset])
