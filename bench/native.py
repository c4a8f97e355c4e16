"""The typed face of the load generator's C, compiled on the way if need be."""

from typing import Any, Protocol, cast

from bench.build import build
from ring.native import Pointer

build()

import bench._native as _native  # noqa: E402  # exists only now


class Library(Protocol):
    """What `native.cdef` declares."""

    HISTOGRAM_STEPS: int
    HISTOGRAM_BUCKETS: int
    PATTERN_RANDOM: int
    PATTERN_SEQUENTIAL: int
    PATTERN_ONCE: int
    LOAD_READ: int
    LOAD_WRITE: int
    LOAD_FLUSH: int
    LOAD_DISCARD: int
    LOAD_WRITE_ZEROES: int

    def load_memory_nbytes(self, job: Pointer, /) -> int: ...
    def load_create(self, job: Pointer, queues: Pointer, host: Pointer, guest_address: int, /) -> Pointer: ...
    def load_destroy(self, load: Pointer, /) -> None: ...
    def load_reset(self, load: Pointer, /) -> None: ...
    def load_run(self, load: Pointer, nanoseconds: int, /) -> int: ...
    def load_drain(self, load: Pointer, /) -> int: ...
    def load_counts(self, load: Pointer, /) -> Any: ...


lib = cast(Library, _native.lib)
ffi: Any = _native.ffi
