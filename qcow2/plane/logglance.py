"""A look at a link log that tells what waits in it, and reads no more than that takes."""

from bisect import bisect_left
from collections.abc import Callable

from qcow2.plane.linklog import RECORD_BYTES, RECORDS_OFFSET, FoundLog, capacity_of, number_of, read_log, valid_records

Reading = Callable[[int, int], bytes]  # offset, and how many bytes


def glance(read: Reading) -> FoundLog | None:
    """As `read_log`, but without live bits, and without the records that waited no more when the newest was made."""
    head = read(0, RECORDS_OFFSET)
    found = read_log(head)
    if found is None:
        return None
    ring = _Ring(read, capacity_of(head))
    records = ring.newest_and_what_it_keeps()
    return found._replace(records=ring.all() if records is None else records)


class _Ring:
    """The records of a log."""

    def __init__(self, read: Reading, capacity: int) -> None:
        self._read = read
        self._capacity = capacity

    def newest_and_what_it_keeps(self) -> dict[int, tuple[int, ...]] | None:
        """The newest record, and those from the first live one on; None if only all records tell.

        Numbers rise up to the newest record; behind it are those of the round before, or nothing.
        """
        first = self._number_at(1)
        if first == 0 and self._number_at(2) == 0:
            return {}
        if first % self._capacity != 1:
            return None
        places = range(self._capacity)
        last = first - 1 + bisect_left(places, True, key=lambda place: self._number_at(first + place) != first + place)
        if self._number_at(last + 2) == last + 2:  # that was a hole
            return None
        for newest in (last, last - 1):  # a death may have torn the one that it was making
            if newest in (record := self._between(newest, newest)):
                live = record[newest][4]
                is_possible = newest - self._capacity < live <= newest
                return self._between(live, newest) if is_possible else record
        return None

    def all(self) -> dict[int, tuple[int, ...]]:
        """Every record."""
        return valid_records(self._slots(0, self._capacity), self._capacity)

    def _between(self, first: int, last: int) -> dict[int, tuple[int, ...]]:
        """Those of the numbers from *first* to *last* that are there, and perhaps others."""
        start, end = first % self._capacity, last % self._capacity + 1
        if start < end:
            return valid_records(self._slots(start, end), self._capacity, start)
        tail = valid_records(self._slots(start, self._capacity), self._capacity, start)
        return tail | valid_records(self._slots(0, end), self._capacity)

    def _number_at(self, number: int) -> int:
        """The number of the record that is where *number* belongs, 0 if none ever was."""
        slot = number % self._capacity
        return number_of(self._slots(slot, slot + 1))

    def _slots(self, start: int, end: int) -> bytes:
        return self._read(RECORDS_OFFSET + start * RECORD_BYTES, (end - start) * RECORD_BYTES)
