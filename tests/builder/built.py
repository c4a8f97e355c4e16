"""An image on the disk and where its tables lie, to be damaged one field at a time."""

import struct
from dataclasses import dataclass
from pathlib import Path

from tests.builder.recipe import Recipe
from tests.builder.record import HEADER_FIELDS


@dataclass(frozen=True)
class Built:
    """A finished image; every method edits the file in place."""

    path: Path
    recipe: Recipe
    l1_offset: int
    l2_offsets: dict[int, int]  # by L1 index
    refcount_table_offset: int
    refcount_block_offsets: dict[int, int]  # by refcount table index

    def poke(self, host_offset: int, data: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(host_offset)
            file.write(data)

    def peek(self, host_offset: int, nbytes: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(host_offset)
            return file.read(nbytes)

    def set_header(self, **fields: int) -> None:
        """Overwrite header fields by their name in the specification."""
        for name, value in fields.items():
            offset, code = HEADER_FIELDS[name]
            self.poke(offset, struct.pack(">" + code, value))

    def set_l1(self, index: int, entry: int) -> None:
        self.poke(self.l1_offset + 8 * index, struct.pack(">Q", entry))

    def l2_entry_offset(self, guest_cluster: int) -> int:
        l1_index, l2_index = divmod(guest_cluster, self.recipe.entries_per_table)
        return self.l2_offsets[l1_index] + self.recipe.entry_size * l2_index

    def l2(self, guest_cluster: int) -> int:
        return int.from_bytes(self.peek(self.l2_entry_offset(guest_cluster), 8), "big")

    def set_l2(self, guest_cluster: int, entry: int) -> None:
        self.poke(self.l2_entry_offset(guest_cluster), struct.pack(">Q", entry))

    def set_refcount_table(self, index: int, entry: int) -> None:
        self.poke(self.refcount_table_offset + 8 * index, struct.pack(">Q", entry))

    def set_refcount(self, host_offset: int, count: int) -> None:
        """Store *count* for the cluster at *host_offset*, true or not."""
        order = self.recipe.refcount_order
        start, bit = self._refcount_place(host_offset)
        if order >= 3:
            self.poke(start, count.to_bytes(1 << order - 3, "big"))
        else:
            mask = (1 << (1 << order)) - 1
            byte = self.peek(start, 1)[0]
            self.poke(start, bytes([byte & ~(mask << bit % 8) | count << bit % 8]))

    def refcount(self, host_offset: int) -> int:
        """What the block says of the cluster at *host_offset*."""
        order = self.recipe.refcount_order
        start, bit = self._refcount_place(host_offset)
        if order >= 3:
            return int.from_bytes(self.peek(start, 1 << order - 3), "big")
        return self.peek(start, 1)[0] >> bit % 8 & (1 << (1 << order)) - 1

    def _refcount_place(self, host_offset: int) -> tuple[int, int]:
        """Host offset of the byte, and the bit in its block, where the count of a cluster begins."""
        order = self.recipe.refcount_order
        index = host_offset // self.recipe.cluster_size
        block, entry = divmod(index, (self.recipe.cluster_size * 8) >> order)
        bit = entry << order
        return self.refcount_block_offsets[block] + bit // 8, bit

    def truncate(self, nbytes: int) -> None:
        with self.path.open("r+b") as file:
            file.truncate(nbytes)
