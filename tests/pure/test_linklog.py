"""The link log as a format: what was appended is found, what was forgotten is not, what is torn is nothing."""

import errno
import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2.plane.linklog import (
    HEADER,
    MAX_LOG_BYTES,
    RECORD_BYTES,
    RECORDS_OFFSET,
    FoundLog,
    Link,
    LinkLog,
    Mark,
    read_log,
)
from qcow2.plane.logglance import glance
from tests.crash.driver import CrashDriver, SimulatedFile
from tests.engine import ORIGIN, TAG, waiting

CAPACITY = 8


class Log:
    """A log that has begun, and its bytes."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.file = SimulatedFile("image", {}, 0)
        self.log = LinkLog(self.file.memory, self.file, ORIGIN, TAG, capacity, renew=lambda: TAG + 1)
        self.fault: OSError | None = None
        self._driver = CrashDriver(fault=lambda operation: self.fault)
        self._driver.run(self.log.begin())

    def append(self, *links: Link) -> None:
        async def store() -> None:
            await self.log.append(links)

        self._driver.run(store())

    def forget(self, before: int) -> None:
        async def store() -> None:
            await self.log.forget(before)

        self._driver.run(store())

    def content(self) -> bytes:
        return bytes(self.file.memory.content)

    def links(self) -> list[Link]:
        found = waiting(self.file)
        assert found is not None
        return found

    def found(self, content: bytes | None = None) -> FoundLog:
        found = read_log(self.content() if content is None else content)
        assert found is not None
        return found


def link(number: int) -> Link:
    return Link(number, number << 9, number << 9 | 1 << 63)


def test_a_log_that_has_begun_is_empty() -> None:
    found = Log().found()
    assert (found.tag, found.origin, found.records, found.waiting()) == (TAG, ORIGIN, {}, 0)


def test_links_are_found_in_the_order_they_came() -> None:
    log = Log()
    log.append(link(5), link(3))
    log.append(link(9))
    assert log.links() == [link(5), link(3), link(9)]


def test_what_is_forgotten_is_not_found() -> None:
    log = Log()
    log.append(link(1), link(2))
    mark = log.log.next
    log.append(link(3))
    log.forget(mark)
    assert log.links() == [link(3)]
    log.forget(log.log.next)
    assert log.links() == []


@pytest.mark.parametrize("capacity", [4, 5, 8])
def test_the_ring_goes_round_and_never_loses_a_live_link(capacity: int) -> None:
    log, rng, alive = Log(capacity), random.Random(capacity), list[tuple[int, Link]]()
    for number in range(200):
        if log.log.room and rng.random() < 0.7:
            alive.append((log.log.next, link(number)))
            log.append(link(number))
        elif alive:  # a commit forgets one link at least
            mark = rng.choice([sequence for sequence, _ in alive[1:]] + [log.log.next])
            alive = [(sequence, one) for sequence, one in alive if sequence >= mark]
            log.forget(mark)
        assert log.links() == [one for _, one in alive]


def test_there_is_always_room_to_forget() -> None:
    log = Log(4)
    log.append(*map(link, range(log.log.room)))
    assert log.log.room == 0
    log.forget(log.log.next)
    assert log.log.room == 2
    assert log.links() == []


def test_a_record_counts_once_the_mark_names_it() -> None:
    """A death between the two: nobody was told of it, and the next record takes its place."""
    log = Log()
    log.append(link(1))
    mark = log.file.read(88, 7)
    log.append(link(2), link(3))
    log.file.write(88, mark)
    assert log.links() == [link(1)]


def test_an_earlier_state_gets_the_links_of_its_time_or_none() -> None:
    """A restored image says which record was the newest; if that is gone, the log is not of its state."""
    log, states = Log(), dict[bytes, list[Link] | None]()
    for number in range(40):
        if not log.log.room:
            log.forget(log.log.next - 2)
        log.append(link(number))
        states[log.file.read(88, 7)] = log.links()
    known = 0
    for mark, links in states.items():
        log.file.write(88, mark)
        found = waiting(log.file)
        assert found in (links, None)
        known += found is not None
    assert 1 <= known <= CAPACITY


def test_no_mark_while_no_link_waits() -> None:
    log = Log()
    assert log.file.read(88, 7) == bytes(7)
    log.append(link(1))
    assert log.file.read(88, 7) != bytes(7)
    log.forget(log.log.next)
    assert log.file.read(88, 7) == bytes(7)


@pytest.mark.parametrize("number", [1, (1 << 20) - 2, (1 << 20) - 1, 1 << 20, 5 << 20, (1 << 40) + 7])
def test_the_stamp_is_never_that_of_no_record(number: int) -> None:
    log = Log()
    log.log.native.first = log.log.native.next = number
    log.append(link(1))
    assert Mark.parse(int.from_bytes(log.file.read(88, 7), "big")).stamp != 0
    assert log.links() == [link(1)]


@pytest.mark.parametrize("act", [lambda log: log.append(link(2)), lambda log: log.forget(log.log.next)])
def test_a_store_that_fails_has_not_been(act: Callable[[Log], None]) -> None:
    log = Log()
    log.append(link(1))
    log.fault = OSError(errno.ENOSPC, "full")
    with pytest.raises(OSError):
        act(log)
    log.fault = None
    assert log.links() == [link(1)]
    log.append(link(3))
    assert log.links() == [link(1), link(3)]


def torn(log: Log, record: int) -> Iterator[bytes]:
    """The bytes of *log*, whose record in slot *record* a death has cut short."""
    start = RECORDS_OFFSET + record * RECORD_BYTES
    content = log.content()
    for kept in range(0, 44, 7):
        yield content[: start + kept] + bytes(RECORD_BYTES - kept) + content[start + RECORD_BYTES :]


def test_a_log_that_lacks_a_record_does_not_count() -> None:
    log = Log()
    log.append(link(1), link(2))
    for record in (1, 2):
        for content in torn(log, record):
            log.file.memory.store(0, content)
            assert waiting(log.file) is None


@pytest.mark.parametrize("position", range(HEADER.size + len(ORIGIN.path) + 4))
def test_each_byte_of_the_header_counts(position: int) -> None:
    content = bytearray(Log().content())
    content[position] ^= 0x40
    assert read_log(bytes(content)) is None


@given(st.binary(max_size=400), st.integers(0, 100) | st.integers(RECORDS_OFFSET - 50, RECORDS_OFFSET + 400))
def test_garbage_is_void_or_harmless(garbage: bytes, at: int) -> None:
    log = Log()
    log.append(*map(link, range(5)))
    content = bytearray(log.content())
    content[at : at + len(garbage)] = garbage
    log.file.memory.store(0, bytes(content))
    assert waiting(log.file) in (None, list(map(link, range(5))))


def test_what_follows_the_records_is_no_live_bits_if_it_does_not_say_so() -> None:
    found = read_log(Log().content().ljust(MAX_LOG_BYTES, b"\0"))
    assert found is not None
    assert found.live is None


def glanced(content: bytes) -> tuple[int, int]:
    """How many links a glance at a log says that wait, and how many bytes it read."""
    taken = list[int]()

    def read(offset: int, nbytes: int) -> bytes:
        taken.append(nbytes)
        return content[offset : offset + nbytes]

    found = glance(read)
    assert found is not None
    return found.waiting(), sum(taken)


@pytest.mark.parametrize("capacity", [4, 5, 8, 16])
def test_a_glance_tells_what_waits(capacity: int) -> None:
    log, rng = Log(capacity), random.Random(capacity)
    for number in range(300):
        if log.log.room and rng.random() < 0.6:
            log.append(*map(link, range(number, number + rng.randint(1, log.log.room))))
        elif log.log.room < capacity - 1:
            log.forget(rng.randint(int(log.log.native.first) + 1, log.log.next))
        for content in [log.content(), *torn(log, (log.log.next - 1) % capacity), *torn(log, rng.randrange(capacity))]:
            assert glanced(content)[0] == log.found(content).waiting()


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_a_glance_reads_what_waits_and_little_more(rounds: int) -> None:
    log = Log(1 << 12)
    for _ in range(rounds + 1):
        log.append(*map(link, range(3000)))
        log.forget(log.log.next)
    log.append(*map(link, range(20)))
    waiting, nread = glanced(log.content())
    assert waiting == 20
    assert nread <= RECORDS_OFFSET + 40 * RECORD_BYTES
