"""Zeros said without the zero flag, which version 2 does not know.

Killed at any moment the image shows the same: data that is written in place of a flag is stable before the flag goes.
"""

from array import array
from collections.abc import Callable

from qcow2.driver.buffer import MemoryBuffer
from qcow2.driver.operation import File, Read
from qcow2.engine.opened import Opened
from qcow2.engine.write import Writer
from qcow2.engine.zeroing import Zeroer
from qcow2.format.geometry import Geometry
from qcow2.plane.entry import Entries, l1_table
from qcow2.plane.l2cache import Kind, Run


async def expand_zeros(opened: Opened, writer: Writer, zeroer: Zeroer, on_step: Callable[[], None]) -> None:
    """Let no cluster of the disk have the zero flag: none it is, or one that holds zeros. Nobody else acts.

    *on_step()* may raise.
    """
    geometry, offset = opened.geometry, 0
    while offset < geometry.size:
        on_step()
        run = await opened.mapping.resolve(offset, min(geometry.size, geometry.slice_end(offset)) - offset)
        match run.kind:
            case Kind.ZERO_ALLOCATED:
                await writer.write(offset, MemoryBuffer(memoryview(bytes(run.nbytes))))
            case Kind.ZERO_PLAIN if opened.reader.backing is not None:
                run = await _placed(run, offset, writer)
            case Kind.ZERO_PLAIN:
                await zeroer.uncover(offset, offset + run.nbytes)
        offset += run.nbytes


async def _placed(run: Run, offset: int, writer: Writer) -> Run:
    """What of *run* has got a place."""
    nbytes = min(run.nbytes, await writer.place(run, offset, writes=False))
    return run._replace(nbytes=nbytes)


async def has_zero_flags(file: File, geometry: Geometry, l1: "array[int]") -> bool:
    """Whether a table that *l1* leads to has one."""
    entries = Entries.of(geometry)
    for entry in l1:
        if table := l1_table(entry):
            content = await Read(file, table, geometry.cluster_size)
            if any(map(entries.has_zero_flag, entries.unpack(content))):
                return True
    return False
