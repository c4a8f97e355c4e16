"""Guest memory: the regions a front-end shares, and their mappings."""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ring.native import Pointer, check, ffi, lib

REGIONS_MAX = 512


@dataclass(frozen=True, eq=False, slots=True)
class MemoryRegion:
    """One region of a memory table; compared by identity, since the same addresses may come with new memory.

    *fd* belongs to the region until a worker maps it: the worker closes it then, whether or not the mapping
    succeeds, and never looks at the number again.
    """

    fd: int
    guest_address: int
    user_address: int
    nbytes: int
    mmap_offset: int


class Mapping:
    """One region mapped into this process, until `close`."""

    def __init__(self, region: MemoryRegion) -> None:
        """Map *region* and close its fd, also when the mapping fails.

        Raises: OSError if the file cannot be mapped, is shorter than the region, or an address wraps.
        """
        self.native: Pointer = ffi.new("struct guest_region *")
        try:
            check(
                lib.guest_region_map(
                    self.native,
                    region.fd,
                    region.guest_address,
                    region.user_address,
                    region.nbytes,
                    region.mmap_offset,
                ),
                f"memory region at guest address {region.guest_address:#x}, {region.nbytes:#x} bytes",
            )
        finally:
            close_shared(region.fd)

    @property
    def address(self) -> Pointer:
        """Where the region's first byte is in this process; borrowed."""
        native: Any = self.native
        host: Pointer = native.host
        return host

    def close(self) -> None:
        """Unmap; nothing may use the region's bytes any more."""
        lib.guest_region_unmap(self.native)


def close_shared(fd: int) -> None:
    """Close the file of somebody else's memory: what the host could not write of it is their loss, *fd* is closed."""
    with contextlib.suppress(OSError):
        os.close(fd)


def map_regions(regions: Sequence[MemoryRegion]) -> dict[MemoryRegion, Mapping]:
    """Map all *regions* or none; closes every fd either way."""
    mappings: dict[MemoryRegion, Mapping] = {}
    for region in regions:
        try:
            mappings[region] = Mapping(region)
        except OSError:
            for mapping in mappings.values():
                mapping.close()
            for left in regions[len(mappings) + 1 :]:
                close_shared(left.fd)
            raise
    return mappings


def native_table(mappings: dict[MemoryRegion, Mapping]) -> Pointer:
    """Build the `struct guest_memory` of *mappings*, which stays valid as long as they do.

    Raises: OSError EEXIST if two regions overlap, E2BIG if there are more than `REGIONS_MAX`.
    """
    memory: Pointer = ffi.new("struct guest_memory *")
    for region, mapping in mappings.items():
        check(lib.guest_memory_add(memory, mapping.native), f"memory region at guest address {region.guest_address:#x}")
    return memory
