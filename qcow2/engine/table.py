"""L2 tables: a new one where there is none, a copy where a snapshot shares it."""

from collections.abc import Iterable
from itertools import islice

from qcow2.driver.operation import Read, Signal
from qcow2.engine.opened import Opened
from qcow2.engine.part import Part
from qcow2.engine.rollback import Rollback
from qcow2.engine.root import Root
from qcow2.engine.space import Space

MOST_TABLES = 64  # that are made ahead: a write each
MOST_BYTES = 4 << 20  # of them


class Tables(Part):
    """Makes sure that an L2 entry can be changed."""

    def __init__(self, opened: Opened, root: Root, space: Space) -> None:
        super().__init__(opened, root, space)
        self._under_way: dict[int, Signal] = {}  # by L1 index

    async def require_private(self, guest_offset: int) -> None:
        """Return once an L2 table of this image alone maps *guest_offset*.

        Raises: OSError; ENOSPC leaves everything as it was.
        """
        while not self._mapping.has_private_table(guest_offset):
            index = self._geometry.l1_index(guest_offset)
            if index in self._under_way:
                await self._under_way[index].wait()
            else:
                await self._make_private(index, guest_offset)

    async def require_some(self, used: Iterable[range]) -> None:
        """As `require_private` for the guest bytes *used*, until there are `MOST_BYTES` of tables, one at least."""
        bits = self._geometry.table_bits
        indexes = dict.fromkeys(index for part in used for index in range(part.start >> bits, (part[-1] >> bits) + 1))
        for index in islice(indexes, min(MOST_TABLES, max(1, MOST_BYTES // self._geometry.cluster_size))):
            await self.require_private(index << bits)

    async def _make_private(self, index: int, guest_offset: int) -> None:
        signal = self._under_way[index] = Signal()
        try:
            new = await self._allocator.allocate_zeros()
            async with Rollback(self._reaper.free, new):
                await self._fill_and_point(guest_offset, new.start << self._geometry.cluster_bits)
        finally:
            del self._under_way[index]
            signal.set()

    async def _fill_and_point(self, guest_offset: int, host_offset: int) -> None:
        """Point the L1 entry at the new table; a cluster just allocated is a table without entries, stable (law 6)."""
        self._statistics.l2_tables += 1
        old: list[int] = []
        if self._mapping.has_table(guest_offset):
            shared = self._mapping.table_offset(guest_offset)
            old = [shared >> self._geometry.cluster_bits]
            table = await Read(self._file, shared, self._geometry.cluster_size)
            await self._stability.write(host_offset, table)
            await self._stability.sync()  # entries that are lost would uncover the backing file or zeros (law 3)
        await self._root.allow_uncounted()
        await self._mapping.set_table(guest_offset, host_offset)
        if not old:
            self._mapping.know_empty(guest_offset)
        await self._reaper.free(old)
