"""Many transfers in one call: between two calls a thread waits for others that want Python, too."""

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

from qcow2.driver import operation as op
from qcow2.driver.buffer import MemoryBuffer
from qcow2.native import check, ffi, lib


def is_transferred(fd: int, operations: Sequence[op.ReadInto | op.Write]) -> bool:
    """Do *operations*, all of the file *fd*, if they are alike and each has its bytes in one piece of our memory.

    False: nothing has been done. Raises: OSError.
    """
    kinds = {type(each) for each in operations}
    memories = [memory for each in operations if (memory := _memory_of(each)) is not None]
    if len(operations) < 2 or len(kinds) > 1 or len(memories) < len(operations):
        return False
    do = lib.fill_all if kinds == {op.ReadInto} else lib.store_all
    with ExitStack() as stack:
        views = [stack.enter_context(_borrowed(memory)) for memory in memories]
        transfers = [(view, len(view), each.host_offset) for view, each in zip(views, operations, strict=True)]
        check(do(fd, ffi.new("struct transfer[]", transfers), len(transfers)))
    return True


def _memory_of(operation: op.ReadInto | op.Write) -> memoryview | bytes | bytearray | None:
    """All that it reads or writes, if that is in one piece and ours."""
    if isinstance(operation, op.ReadInto):
        return operation.target.view if isinstance(operation.target, MemoryBuffer) else None
    piece = operation.pieces[0] if len(operation.pieces) == 1 else None
    if isinstance(piece, bytes | bytearray | memoryview):
        return piece
    return piece.view if isinstance(piece, MemoryBuffer) else None


def copy_data(operation: op.CopyData, source: int, target: int) -> list[list[tuple[int, int]]]:
    """Do what *operation* promises, from one descriptor to the other. Raises: OSError."""
    pairs, n = ffi.new("struct stretch_pair[]", operation.pairs), len(operation.pairs)
    bounds = ffi.new("uint32_t[]", sum(nbytes // operation.unit + 2 for _, _, nbytes in operation.pairs))
    counts = ffi.new("uint32_t[]", n)
    with _borrowed(operation.scratch) as scratch:
        check(lib.copy_between(source, target, pairs, n, operation.unit, scratch, bounds, counts))
    numbers = iter(ffi.unpack(bounds, sum(counts)))
    of_each = [islice(numbers, count) for count in counts]
    return [list(zip(some, some, strict=True)) for some in of_each]


def count_equal(operation: op.Equal, one: int, other: int) -> int:
    """Do what *operation* promises, of two descriptors. Raises: OSError."""
    pairs = ffi.new("struct stretch_pair[]", operation.pairs)
    with _borrowed(operation.scratch) as scratch:
        return check(lib.equal_between(one, other, pairs, len(operation.pairs), scratch))


def _borrowed(memory: memoryview | bytes | bytearray) -> Any:
    """A C view of *memory*, given back at the end of the block: in a cycle of an error's traceback it would crash."""
    return ffi.from_buffer("uint8_t[]", memory)
