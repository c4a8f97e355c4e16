"""Where guest bytes are: the addresses of a C extent map, and the map of a raw file."""

from typing import NamedTuple

from ring.native import Pointer, ffi, lib


class ExtentMap(NamedTuple):
    """An `extent_translate`, its context, its `struct extent_places` if any: valid as long as their owner lives."""

    translate_address: int
    context_address: int
    places_address: int = 0


class IdentityMap:
    """A raw file: guest offset is host offset, within the first *nbytes* of the file in *slot*."""

    def __init__(self, *, slot: int, nbytes: int, writable: bool) -> None:
        self._context: Pointer = ffi.new(
            "struct identity_map *", {"nbytes": nbytes, "slot": slot, "writable": writable}
        )

    @property
    def extent_map(self) -> ExtentMap:
        """The map's addresses; borrowed, keep this object while a worker uses them."""
        return ExtentMap(lib.identity_map_translate_address(), int(ffi.cast("uintptr_t", self._context)))
