"""What the data plane counted."""

from ring.native import Pointer, ffi

NAMES = tuple(name for name, _ in ffi.typeof("struct worker_counters").fields)


class Counters:
    """A snapshot of `struct worker_counters` (`ring/counters.h`), an attribute each, in its order.

    Good from any thread, each count by itself is exact.
    """

    def __init__(self, native: Pointer) -> None:
        vars(self).update((name, getattr(native, name)) for name in NAMES)

    def __getattr__(self, name: str) -> int:
        raise AttributeError(f"nobody counts {name!r}")
