"""What bytes are: pure functions over buffers that release the GIL."""

from qcow2.format.layout import SECTOR_SIZE
from qcow2.native import ffi, lib

COMPARED = 4096  # bytes at a time
SPARSE_UNIT = 4096  # bytes of zeros that are left out, if nobody says otherwise


def data_runs(data: memoryview, unit: int) -> list[tuple[int, int]]:
    """Where *data* is not zeros, as (start, end), in units of *unit* bytes."""
    bounds = ffi.new("uint32_t[]", len(data) // unit + 2)
    count = lib.data_runs(ffi.from_buffer("uint8_t[]", data), len(data), unit, bounds)
    flat = ffi.unpack(bounds, count)
    return list(zip(flat[::2], flat[1::2], strict=True))


def equal_bytes(one: memoryview, other: memoryview) -> int:
    """How many bytes at the front are equal, in sectors; all if nothing differs."""
    view = ffi.from_buffer("uint8_t[]", one), ffi.from_buffer("uint8_t[]", other)
    return lib.equal_bytes(*view, len(one), COMPARED)


def zero_bytes(data: memoryview) -> int:
    """How many bytes at the front are zeros, in sectors; all if no other is there."""
    runs = data_runs(data, SECTOR_SIZE)
    return runs[0][0] if runs else len(data)


def different_units(one: memoryview, other: memoryview, unit: int) -> list[tuple[int, int]]:
    """Where they differ, as (start, end), in units of *unit* bytes."""
    bounds: list[tuple[int, int]] = []
    for start in range(0, len(one), unit):
        end = min(start + unit, len(one))
        if equal_bytes(one[start:end], other[start:end]) == end - start:
            continue
        if bounds and bounds[-1][1] == start:
            bounds[-1] = bounds[-1][0], end
        else:
            bounds.append((start, end))
    return bounds
