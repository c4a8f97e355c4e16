"""Load from a guest that remembers: which writes were acknowledged, which were in flight, what each block may hold."""

import random
import struct
from dataclasses import dataclass, field

from tests.frontend import OK, OUT, WRITE_ZEROES, Completion, FrontEnd, Queue
from tests.oracle import assert_same_bytes
from tests.workload import Disk

UNMAP = 1


@dataclass
class Load:
    """Blocks of *block_size* bytes, each with at most one write in flight, so its history is a line.

    *base* is what the disk held before the first write.
    """

    guest: FrontEnd
    nblocks: int
    block_size: int = 4096
    seed: int = 0
    depth: int = 32
    zeroes: bool = False  # every eighth request is a WRITE_ZEROES with UNMAP
    base: bytes = b""
    held: dict[int, bytes] = field(default_factory=dict)  # block: the last acknowledged content
    in_flight: dict[tuple[int, int], tuple[int, bytes]] = field(default_factory=dict)  # (queue, slot): block, content
    completed: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.serial = 0

    def run(self, count: int) -> None:
        """Keep every queue full until *count* more requests have completed; then some are still in flight."""
        target = self.completed + count
        while self.completed < target:
            for index, queue in enumerate(self.guest.queues):
                self._fill(index, queue)
            if not self._reap():
                self.guest.wait_for_call()

    def drain(self) -> None:
        """Wait for what is in flight."""
        while self.in_flight:
            if not self._reap():
                self.guest.wait_for_call()

    def take_the_last(self) -> None:
        """The daemon is dead: what it has put into the used rings was acknowledged all the same."""
        self._reap()

    def _fill(self, index: int, queue: Queue) -> None:
        busy = {block for block, _ in self.in_flight.values()}
        mine = sum(of == index for of, _ in self.in_flight)
        while mine < self.depth:
            block = self.rng.randrange(self.nblocks)
            if block in busy:
                continue
            slot, content = self._submit(queue, block)
            self.in_flight[index, slot] = block, content
            busy.add(block)
            mine += 1

    def _submit(self, queue: Queue, block: int) -> tuple[int, bytes]:
        self.serial += 1
        start = block * self.block_size
        if self.zeroes and self.serial % 8 == 0:
            segment = struct.pack("<QII", start // 512, self.block_size // 512, UNMAP)
            return queue.submit(WRITE_ZEROES, 0, segment), bytes(self.block_size)
        content = struct.pack("<QQ", self.serial, block) * (self.block_size // 16)
        return queue.submit(OUT, start, content), content

    def _reap(self) -> int:
        reaped = 0
        for index, queue in enumerate(self.guest.queues):
            for done in queue.reap():
                self._acknowledge(index, done)
                reaped += 1
        return reaped

    def _acknowledge(self, index: int, done: Completion) -> None:
        block, content = self.in_flight.pop((index, done.slot))
        assert done.status == OK, f"block {block}: status {done.status}"
        self.held[block] = content
        self.completed += 1

    def verify(self, disk: Disk) -> None:
        """Every block holds what was acknowledged last; where a write was in flight, each sector may be the newer."""
        pending: dict[int, bytes] = dict(self.in_flight.values())
        for block in range(self.nblocks):
            start = block * self.block_size
            now = bytes(disk.read(start, self.block_size))
            old = self.held.get(block) or self.base[start : start + self.block_size].ljust(self.block_size, b"\0")
            if now == old:
                continue
            new = pending.get(block)
            if new is None:
                assert_same_bytes(now, old)
            for at in range(0, self.block_size, 512):
                sector = now[at : at + 512]
                assert sector in (old[at : at + 512], (new or old)[at : at + 512]), (
                    f"block {block}: {sector[:16].hex()}"
                )

    def expected(self) -> bytes:
        """The whole disk, once nothing is in flight."""
        disk = bytearray(self.base.ljust(self.nblocks * self.block_size, b"\0"))
        for block, content in self.held.items():
            disk[block * self.block_size : (block + 1) * self.block_size] = content
        return bytes(disk)
