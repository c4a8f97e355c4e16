"""The typed face of qcow2's C; a negative errno becomes OSError here."""

import os
from typing import Any, NewType, Protocol, cast

from qcow2 import _native

CData = NewType("CData", object)


class Lib(Protocol):
    """The functions of `native.cdef`."""

    def punch_hole(self, fd: int, host_offset: int, nbytes: int) -> int: ...


lib = cast(Lib, _native.lib)
ffi: Any = _native.ffi


def check(result: int) -> int:
    """Return *result*, or raise the OSError that a negative one names."""
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result
