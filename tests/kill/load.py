"""Requests of a guest, many at once on several queues: writes of every size, write-zeroes, discards and flushes."""

import random
import struct
from dataclasses import dataclass

from tests.frontend import DISCARD, FLUSH, OK, OUT, WRITE_ZEROES, FrontEnd, Queue
from tests.kill.ledger import SECTOR, Ledger

UNMAP = 1
SECTORS_MAX = 512  # of one request: 256 KiB
KINDS, WEIGHTS = (OUT, WRITE_ZEROES, DISCARD, FLUSH), (70, 8, 8, 6)


@dataclass(frozen=True)
class Sent:
    """A request in flight."""

    kind: int
    first: int = 0
    content: bytes = b""  # what it leaves there

    @property
    def end(self) -> int:
        return self.first + len(self.content) // SECTOR

    def overlaps(self, first: int, end: int) -> bool:
        return self.first < end and first < self.end


class Load:
    """Keeps *depth* requests in flight on each queue, and the ledger."""

    def __init__(
        self,
        guest: FrontEnd,
        ledger: Ledger,
        draw: random.Random,
        *,
        cluster_sectors: int,
        depth: int,
        may_fail: bool = False,
    ) -> None:
        """If they *may_fail*, failed requests are counted; what they were to write may be there."""
        self.guest = guest
        self.acknowledged = 0  # or failed
        self.failed = 0
        self._may_fail = may_fail
        self._ledger = ledger
        self._draw = draw
        self._cluster_sectors = cluster_sectors
        self._depth = depth
        self._home = draw.randrange(ledger.nsectors)  # half of the requests lie near it
        self._in_flight: list[dict[int, Sent]] = [{} for _ in guest.queues]  # by slot

    @property
    def in_flight(self) -> int:
        return sum(map(len, self._in_flight))

    def run(self, count: int) -> None:
        """Until *count* requests have been acknowledged; then every queue is as full as before."""
        target = self.acknowledged + count
        while self.acknowledged < target:
            self.fill()
            if not self.reap():
                self.guest.wait_for_call()

    def fill(self) -> None:
        """Send until every queue is full."""
        for index, queue in enumerate(self.guest.queues):
            while len(self._in_flight[index]) < self._depth:
                self._send(queue, self._in_flight[index])

    def drain(self) -> None:
        """Wait for what is in flight."""
        while self.in_flight:
            if not self.reap():
                self.guest.wait_for_call()

    def reap(self) -> int:
        """Take what the used rings hold, be the daemon alive or dead; how many requests that were."""
        count = 0
        for queue, in_flight in zip(self.guest.queues, self._in_flight, strict=True):
            for done in queue.reap():
                sent = in_flight.pop(done.slot)
                assert done.status == OK or self._may_fail, f"{sent.kind} at sector {sent.first}: status {done.status}"
                if done.status != OK:
                    self.failed += 1
                elif sent.kind in (OUT, WRITE_ZEROES):  # a discard is a hint: what was there may still be
                    self._ledger.acknowledge(sent.first, sent.content)
                count += 1
        self.acknowledged += count
        return count

    def _send(self, queue: Queue, in_flight: dict[int, Sent]) -> None:
        (kind,) = self._draw.choices(KINDS, WEIGHTS)
        if kind == FLUSH:
            in_flight[queue.submit(FLUSH)] = Sent(FLUSH)
            return
        first, nsectors = self._free_range()
        content = self._ledger.draft(first, nsectors) if kind == OUT else bytes(nsectors * SECTOR)
        self._ledger.begin(first, content)
        if kind == OUT:
            slot = queue.submit(OUT, first * SECTOR, content)
        else:
            flags = self._draw.choice((0, UNMAP)) if kind == WRITE_ZEROES else 0
            slot = queue.submit(kind, 0, struct.pack("<QII", first, nsectors, flags))
        in_flight[slot] = Sent(kind, first, content)

    def _free_range(self) -> tuple[int, int]:
        """Sectors that no request in flight touches."""
        while True:
            first, nsectors = self._range()
            busy = (sent.overlaps(first, first + nsectors) for of in self._in_flight for sent in of.values())
            if not any(busy):
                return first, nsectors

    def _range(self) -> tuple[int, int]:
        draw, cluster = self._draw, self._cluster_sectors
        nsectors = draw.choice([1, draw.randint(1, 24), 8, 8, 8, cluster, min(2 * cluster, SECTORS_MAX)])
        first = draw.randrange(self._ledger.nsectors)
        if draw.random() < 0.5:
            first = (self._home + draw.randrange(64 * cluster)) % self._ledger.nsectors
        if nsectors >= 8:
            first -= first % min(nsectors, cluster)
        return first, min(nsectors, self._ledger.nsectors - first)
