"""A packed virtqueue of the front-end in plain Python, and a device's in-flight tracking of it by the letter."""

import os
import struct
from collections.abc import Iterator, Sequence

from tests.frontend import GUEST_ADDRESS, NEXT, QUEUE_SIZE, Completion, FrontEnd, Queue
from tests.inflightmodel import Region

AVAILABLE, USED = 1 << 7, 1 << 15
RING_PACKED = 1 << 34


class Position:
    """A place in the ring and its lap's wrap counter."""

    def __init__(self, index: int = 0, wrap: int = 1) -> None:
        self.index, self.wrap = index, wrap

    def advance(self, count: int) -> None:
        self.index += count
        if self.index >= QUEUE_SIZE:
            self.index -= QUEUE_SIZE
            self.wrap ^= 1

    def after(self, count: int) -> "Position":
        position = Position(self.index, self.wrap)
        position.advance(count)
        return position

    @property
    def available(self) -> int:
        return AVAILABLE if self.wrap else USED

    @property
    def used(self) -> int:
        return AVAILABLE | USED if self.wrap else 0

    def pack(self) -> int:
        return self.index | self.wrap << 15


class PackedQueue(Queue):
    """Buffer ids are the slots of the requests."""

    feature = RING_PACKED

    def __init__(self, memory: memoryview, start: int) -> None:
        super().__init__(memory, start)
        self.flags = memory[start : start + 16 * QUEUE_SIZE].cast("H")
        self.lengths: dict[int, int] = {}
        self.begin_at(0)

    def close(self) -> None:
        self.flags.release()
        super().close()

    def begin_at(self, index: int) -> None:
        """Be a ring that has been in use before, for so many descriptors."""
        self.fill, self.take = Position(index), Position(index)
        self.first_base = self.fill.pack() * 0x10001
        for cell in range(QUEUE_SIZE):
            self.flags[8 * cell + 7] = Position(cell, int(cell < index)).used

    def base(self) -> int:
        """QEMU cannot know better after a death: the ring has no index to look it up."""
        return self.first_base

    def flags_at(self, index: int) -> int:
        return self.flags[8 * index + 7]

    def _publish(self, slot: int, chain: list[tuple[int, int, int]]) -> None:
        head, head_flags = self.fill.index, 0
        for position, (at, nbytes, flags) in enumerate(chain):
            cell = self.descriptors + 16 * self.fill.index
            self.bytes[cell : cell + 14] = struct.pack("<QIH", GUEST_ADDRESS + at, nbytes, slot)
            flags |= self.fill.available | (NEXT if position + 1 < len(chain) else 0)
            if position == 0:
                head_flags = flags
            else:
                self.flags[8 * self.fill.index + 7] = flags
            self.fill.advance(1)
        self.flags[8 * head + 7] = head_flags
        self.lengths[slot] = len(chain)
        os.eventfd_write(self.kick, 1)

    def has_used(self) -> bool:
        return self.flags_at(self.take.index) & (AVAILABLE | USED) == self.take.used

    def reap(self) -> Iterator[Completion]:
        while self.has_used():
            slot = struct.unpack_from("<H", self.bytes, self.descriptors + 16 * self.take.index + 12)[0]
            self.take.advance(self.lengths.pop(slot))
            yield self._complete(slot)


class PackedModel:
    """The device of a packed ring, one store at a time: header of 32 bytes, 32 bytes a descriptor.

    As the specification has it, except that the wrap counters are stored together with their indices.
    """

    VERSION, FREE_HEAD, OLD_FREE_HEAD, USED_IDX, OLD_USED_IDX, USED_WRAP, OLD_USED_WRAP = 8, 12, 14, 16, 18, 20, 21
    INFLIGHT, NEXT, LAST, NUM, COUNTER, ID, FLAGS, LEN, ADDR = 0, 2, 4, 6, 8, 16, 18, 20, 24
    queue: PackedQueue

    def __init__(self, guest: FrontEnd) -> None:
        queue = guest.queues[0]
        assert isinstance(queue, PackedQueue)
        self.queue = queue
        self.region = Region(32 * QUEUE_SIZE + 64)
        self.region.give(guest)
        self.fetch, self.used = self.queue.fill.after(0), self.queue.fill.after(0)
        self.counter = 0
        self.chains: list[tuple[int, int, int]] = []  # first entry, length, buffer id
        for index in range(QUEUE_SIZE):
            self.region.put(self.entry(index) + self.NEXT, "H", index + 1)
        self.region.put(self.VERSION, "HH", 1, QUEUE_SIZE)
        self._store_used(self.used)
        self._store_old()

    def entry(self, index: int) -> int:
        return 32 + 32 * index

    def life(self, work: Sequence[int | list[int]]) -> Iterator[None]:
        for item in work:
            yield from self._fetch(item) if isinstance(item, int) else self._complete(item)

    def _put(self, index: int, field: int, form: str, *values: int) -> None:
        self.region.put(self.entry(index) + field, form, *values)

    def _get(self, index: int, field: int, form: str) -> int:
        return self.region.get(self.entry(index) + field, form)

    def _fetch(self, count: int) -> Iterator[None]:
        for _ in range(count):
            first = self.region.get(self.OLD_FREE_HEAD, "H")
            length, identity, flags = 0, 0, NEXT
            while flags & NEXT:
                at = self.queue.descriptors + 16 * self.fetch.index
                address, nbytes, identity, flags = struct.unpack_from("<QIHH", self.queue.bytes, at)
                entry = self.region.get(self.FREE_HEAD, "H")
                if length == 0:
                    self._put(first, self.NUM, "H", 0)
                    self._put(first, self.COUNTER, "Q", self.counter)
                    self.counter += 1
                    yield
                    self._put(first, self.INFLIGHT, "B", 1)
                    yield
                if not flags & NEXT:
                    self._put(first, self.LAST, "H", entry)
                    yield
                length += 1
                self._put(first, self.NUM, "H", length)
                yield
                self._put(entry, self.ID, "HHIQ", identity, flags, nbytes, address)
                yield
                self.region.put(self.FREE_HEAD, "H", self._get(entry, self.NEXT, "H"))
                yield
                self.fetch.advance(1)
            self.region.put(self.OLD_FREE_HEAD, "H", self.region.get(self.FREE_HEAD, "H"))
            self.chains.append((first, length, identity))
            yield

    def _complete(self, positions: list[int]) -> Iterator[None]:
        chains = [self.chains[position] for position in positions]
        for first, _, _ in chains:
            self._put(self._get(first, self.LAST, "H"), self.NEXT, "H", self.region.get(self.FREE_HEAD, "H"))
            yield
            self.region.put(self.FREE_HEAD, "H", first)
            yield
        places, end = [], self.used.after(0)
        for _, length, identity in chains:
            places.append((end.after(0), identity))
            end.advance(length)
        self._store_used(end)
        yield
        for place, identity in [*places[1:], places[0]]:
            at = self.queue.descriptors + 16 * place.index
            self.queue.bytes[at + 8 : at + 14] = struct.pack("<IH", 1, identity)
            yield
            self.queue.flags[8 * place.index + 7] = place.used
            yield
        for first, _, _ in chains:
            self._put(first, self.INFLIGHT, "B", 0)
            yield
        self.region.put(self.OLD_FREE_HEAD, "H", self.region.get(self.FREE_HEAD, "H"))
        yield
        self.used = end
        self._store_old()
        yield

    def _store_used(self, position: Position) -> None:
        self.region.put(self.USED_IDX, "H", position.index)
        self.region.put(self.USED_WRAP, "B", position.wrap)

    def _store_old(self) -> None:
        self.region.put(self.OLD_USED_IDX, "H", self.used.index)
        self.region.put(self.OLD_USED_WRAP, "B", self.used.wrap)
