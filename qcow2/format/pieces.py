"""A table of any length, piece by piece: what lies in a hole of the file costs no look at each of its entries."""

from collections.abc import AsyncIterator

from qcow2.driver.operation import File, Occupied, Read


async def pieces(file: File, host_offset: int, nbytes: int, most: int) -> AsyncIterator[tuple[int, bytes]]:
    """Of the *nbytes* at *host_offset* all but zeros, *most* at a time: how far in, and what is there."""
    zeros, at = bytes(most), 0
    while at < nbytes:
        content = await Read(file, host_offset + at, min(most, nbytes - at))
        if content != zeros:
            yield at, content
        at += most
        if content == zeros and at < nbytes:
            is_data, stretch = await Occupied(file, host_offset + at, nbytes - at)
            at += 0 if is_data else stretch // most * most
