"""A device that keeps in-flight tracking by the letter of the specification, one store at a time, and can die anywhere.

`SplitModel.life` is a generator that yields after each store; whoever stops iterating is a SIGKILL. It shares no line
with the product. Spec: vhost-user "Inflight I/O tracking".
"""

import mmap
import os
import struct
from collections.abc import Iterator, Sequence

from tests.frontend import QUEUE_SIZE, FrontEnd


class Region:
    """An in-flight region of one queue, in a memfd that `give` hands to a front-end."""

    def __init__(self, nbytes: int) -> None:
        self.fd = os.memfd_create("in-flight")
        os.truncate(self.fd, nbytes)
        self.nbytes = nbytes
        self.memory = mmap.mmap(self.fd, nbytes)

    def give(self, guest: FrontEnd) -> None:
        """Let *guest* keep this region, as if a back-end had made it; its fd is the guest's from here on."""
        guest.inflight = True
        guest.inflight_fd = self.fd
        guest.inflight_payload = struct.pack("<QQHH4x", self.nbytes, 0, 1, QUEUE_SIZE)

    def put(self, at: int, form: str, *values: int) -> None:
        struct.pack_into("<" + form, self.memory, at, *values)

    def get(self, at: int, form: str) -> int:
        return int(struct.unpack_from("<" + form, self.memory, at)[0])


class SplitModel:
    """The device of a split ring: header of 16 bytes, 16 bytes a descriptor."""

    VERSION, DESC_NUM, LAST_BATCH_HEAD, USED_IDX = 8, 10, 12, 14
    INFLIGHT, NEXT, COUNTER = 0, 6, 8

    def __init__(self, guest: FrontEnd) -> None:
        self.queue = guest.queues[0]
        self.region = Region(16 * QUEUE_SIZE + 64)
        self.region.give(guest)
        self.fetched = self.counter = 0
        self.used = self.base = self.queue.used_index[0]
        self.region.put(self.VERSION, "HHHH", 1, QUEUE_SIZE, 0, self.used)

    def entry(self, head: int) -> int:
        return 16 + 16 * head

    def life(self, work: Sequence[int | list[int]]) -> Iterator[None]:
        """Each item of *work* fetches so many chains, or completes those that were fetched at these positions."""
        for item in work:
            yield from self._fetch(item) if isinstance(item, int) else self._complete(item)

    def _head(self, position: int) -> int:
        at = self.queue.driver_ring + 4 + 2 * ((self.base + position) % QUEUE_SIZE)
        return int(struct.unpack_from("<H", self.queue.bytes, at)[0])

    def _fetch(self, count: int) -> Iterator[None]:
        for _ in range(count):
            at = self.entry(self._head(self.fetched))
            self.fetched += 1
            self.region.put(at + self.COUNTER, "Q", self.counter)
            self.counter += 1
            yield
            self.region.put(at + self.INFLIGHT, "B", 1)
            yield

    def _complete(self, positions: list[int]) -> Iterator[None]:
        heads = [self._head(position) for position in positions]
        for index, head in enumerate(heads):
            used = self.queue.device_ring + 4 + 8 * ((self.used + index) % QUEUE_SIZE)
            self.queue.bytes[used : used + 8] = struct.pack("<II", head, 1)
            yield
            self.region.put(self.entry(head) + self.NEXT, "H", self.region.get(self.LAST_BATCH_HEAD, "H"))
            yield
            self.region.put(self.LAST_BATCH_HEAD, "H", head)
            yield
        self.used = (self.used + len(heads)) & 0xFFFF
        self.queue.used_index[0] = self.used
        yield
        for head in heads:
            self.region.put(self.entry(head) + self.INFLIGHT, "B", 0)
            yield
        self.region.put(self.USED_IDX, "H", self.used)
        yield
