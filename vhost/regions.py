"""The guest's memory as the front-end has laid it out: regions that neither wrap nor overlap."""

from collections.abc import Collection, Iterator

from vhost import effect
from vhost.message import MemorySlot, MemoryTable, ProtocolViolation, Region
from vhost.vring import Steps

ADDRESS_LIMIT = 1 << 64


class Regions:
    """The memory of one visit, at most *maximum* regions of it."""

    def __init__(self, maximum: int) -> None:
        self.maximum = maximum
        self._regions: list[Region] = []

    def __len__(self) -> int:
        return len(self._regions)

    def __iter__(self) -> Iterator[Region]:
        return iter(self._regions)

    @property
    def end(self) -> int:
        """The guest address behind all of them."""
        return max((region.guest_address + region.size for region in self._regions), default=0)

    def set_table(self, table: MemoryTable) -> Steps:
        for position, region in enumerate(table.regions):
            _check(region, table.regions[:position])
        yield effect.SetMemory(table.regions)
        self._regions = list(table.regions)

    def add(self, slot: MemorySlot) -> Steps:
        if len(self._regions) >= self.maximum:
            raise ProtocolViolation(f"more than {self.maximum} memory regions")
        _check(slot.region, self._regions)
        yield effect.AddMemory(slot.region)
        self._regions.append(slot.region)

    def remove(self, slot: MemorySlot) -> Steps:
        region = self._find(slot.region)
        self._regions.remove(region)
        yield effect.RemoveMemory(region)

    def remove_all(self) -> Steps:
        yield effect.SetMemory(())
        self._regions = []

    def _find(self, wanted: Region) -> Region:
        """The region with the addresses and size of *wanted*, whose mmap_offset means nothing."""
        for region in self._regions:
            if _place(region) == _place(wanted):
                return region
        raise ProtocolViolation(f"no memory region of {wanted.size:#x} bytes at {wanted.guest_address:#x}")


def _place(region: Region) -> tuple[int, int, int]:
    return region.guest_address, region.user_address, region.size


def _check(region: Region, others: Collection[Region]) -> None:
    """Refuse a region that is empty, runs over the end of an address space or overlaps one of *others*."""
    for start in (region.guest_address, region.user_address, region.mmap_offset):
        if region.size == 0 or start + region.size > ADDRESS_LIMIT:
            raise ProtocolViolation(f"a memory region of {region.size:#x} bytes at {start:#x}")
    first, end = region.guest_address, region.guest_address + region.size
    for other in others:
        if first < other.guest_address + other.size and other.guest_address < end:
            raise ProtocolViolation(f"two memory regions at guest address {max(first, other.guest_address):#x}")
