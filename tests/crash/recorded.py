"""A trace of the real daemon (`--trace-io`) as a run to explore: where its image began, what happened, what is owed."""

import errno
from collections.abc import Iterable
from dataclasses import dataclass, field

from ring.trace import Flag, Kind, Record, TraceError
from tests.crash.driver import Completed, Effect, Entry, Issued, Mark, SimulatedFile, Stored, Synced
from tests.crash.history import SECTOR, Flush, History, Version

OK = 0
OUT, FLUSH, DISCARD, WRITE_ZEROES = 1, 4, 11, 13  # virtio 1.2, 5.2.6
TRIED_AGAIN = {
    -number for number in (errno.EINTR, errno.EAGAIN, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV)
}  # after these the worker makes another operation of it, and this one did nothing


@dataclass(frozen=True)
class Recorded:
    """One serving period. *backing* is what lies under the image, as a raw disk."""

    initial: SimulatedFile
    file: SimulatedFile
    journal: list[Entry]
    history: History
    backing: SimulatedFile | None
    touched: set[int]  # sectors of the guest's that a request wanted to differ from what they were

    @property
    def nsectors(self) -> int:
        return len(self.history.initial) // SECTOR

    @property
    def requests(self) -> int:
        """How many changes and flushes the guest asked for."""
        return sum(isinstance(entry, Mark) and entry.what[0] == "REQUEST" for entry in self.journal)


def adapt(records: Iterable[Record], contents: bytes, backing: SimulatedFile | None = None) -> Recorded:
    """The run that *records* tell of; *contents* is the disk as the guest saw it before.

    Raises: TraceError for what the model does not know: a failed or short operation, a cache mode that was changed.
    """
    reading = Reading(list(records), contents)
    for record in reading.records:
        reading.take(record)
    if reading.file is None or reading.initial is None:
        raise TraceError("the trace tells of no writable file")
    history = reading.history
    touched = {
        sector
        for sector, versions in history.versions.items()
        if any(version.content != versions[0].content for version in versions)
    }
    return Recorded(reading.initial, reading.file, reading.journal, history, backing, touched)


@dataclass
class Reading:
    """A trace, read up to some record."""

    records: list[Record]
    contents: bytes
    journal: list[Entry] = field(default_factory=list)
    file: SimulatedFile | None = None
    initial: SimulatedFile | None = None
    unsynced: set[int] = field(default_factory=set)  # operations complete, and not stable yet
    syncs: dict[int, frozenset[int]] = field(default_factory=dict)  # under way: what they cover
    begun: dict[int, list[Version] | Flush] = field(default_factory=dict)  # requests

    def __post_init__(self) -> None:
        self.results = {record.id: record.result for record in self.records if record.kind == Kind.DONE}
        self.lengths = {record.id: record.nbytes for record in self.records if record.kind == Kind.WRITE}
        modes = {record.flags & Flag.WRITETHROUGH for record in self.records if record.kind == Kind.REQUEST}
        if len(modes) > 1:
            raise TraceError("the cache mode was changed within the trace")
        self.history = History(self.contents, writethrough=Flag.WRITETHROUGH in modes)

    def take(self, record: Record) -> None:
        """Go on to the next record."""
        match record.kind:
            case Kind.FILE | Kind.CONTENT:
                self._begin_file(record)
            case Kind.REQUEST:
                self._begin_request(record)
            case Kind.ANSWER:
                self._end_request(record)
            case Kind.WRITE | Kind.ZERO | Kind.RESIZE:
                self._issue(record)
            case Kind.STORE:
                self._store(record)
            case Kind.SYNC:
                self.syncs[record.id] = frozenset(self.unsynced)
            case Kind.DONE:
                self._complete(record)

    def _begin_file(self, record: Record) -> None:
        if record.kind == Kind.CONTENT:
            assert self.initial is not None
            self.initial.write(record.offset, record.content)
        elif Flag.WRITABLE in record.flags:
            path = record.content.decode()
            self.initial = SimulatedFile(path, {}, record.nbytes)
            self.file = SimulatedFile(path, {}, 0)  # who it is; its bytes are never looked at

    def _note(self, record: Record) -> int:
        self.journal.append(Mark((record.kind.name, record.id, record.type, record.offset, record.nbytes)))
        return len(self.journal) - 1

    def _begin_request(self, record: Record) -> None:
        position = self._note(record)
        if record.type == FLUSH:
            flush = Flush(position)
            self.history.flushes.append(flush)
            self.begun[record.id] = flush
            return
        content = record.content if record.type == OUT else bytes(record.nbytes)
        first = record.offset // SECTOR
        sectors = {
            first + index: content[index * SECTOR : (index + 1) * SECTOR] for index in range(record.nbytes // SECTOR)
        }
        self.begun[record.id] = self.history.begin(sectors, position, binding=record.type != DISCARD)

    def _end_request(self, record: Record) -> None:
        position = self._note(record)
        begun = self.begun.pop(record.id)
        if record.result == OK:
            for one in [begun] if isinstance(begun, Flush) else begun:
                one.acked = position

    def _issue(self, record: Record) -> None:
        if self.results.get(record.id) in TRIED_AGAIN:
            return
        assert self.file is not None
        kind = record.kind.name.lower()
        self.journal.append(Issued(record.id, Effect(kind, self.file, record.offset, record.content, record.nbytes)))

    def _store(self, record: Record) -> None:
        """The link log; it begins with its header."""
        assert self.file is not None
        self.journal.append(Stored(self.file.memory, record.offset, record.content))

    def _complete(self, record: Record) -> None:
        if record.result in TRIED_AGAIN:
            return
        assert self.file is not None
        if record.id in self.syncs:
            covered = self.syncs.pop(record.id)
            if record.result < 0:
                raise TraceError(f"sync {record.id} failed: {errno.errorcode[-record.result]}")
            self.unsynced -= covered
            self.journal.append(Synced(self.file, covered))
            return
        if record.result < 0:
            raise TraceError(f"operation {record.id} failed: {errno.errorcode[-record.result]}")
        if record.result != self.lengths.get(record.id, 0):
            raise TraceError(f"write {record.id} was cut short at {record.result} bytes")
        self.unsynced.add(record.id)
        self.journal.append(Completed(record.id))
