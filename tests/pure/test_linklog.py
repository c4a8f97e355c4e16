"""The link log as a format: what was appended is found, what was forgotten is not, what is torn is nothing."""

import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2.driver.crash import CrashDriver, SimulatedMemory
from qcow2.linklog import LOG_BYTES, RECORD_BYTES, RECORDS_OFFSET, FoundLog, Link, LinkLog, read_log

IDENTITY = b"me".ljust(32)
TAG = 0x1234
CAPACITY = 8


class Log:
    """A log that has begun, and its bytes."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.memory = SimulatedMemory()
        self.log = LinkLog(self.memory, IDENTITY, TAG, capacity)
        self._driver = CrashDriver()
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
        return bytes(self.memory.content)

    def links(self) -> list[Link]:
        found = read_log(self.content(), IDENTITY)
        assert found is not None
        return found.links


def link(number: int) -> Link:
    return Link(number, number << 9, number << 9 | 1 << 63)


def test_a_log_that_has_begun_is_empty() -> None:
    assert read_log(Log().content(), IDENTITY) == FoundLog(TAG, [])


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


def torn(log: Log, record: int) -> Iterator[bytes]:
    """The bytes of *log*, whose record in slot *record* a death has cut short."""
    start = RECORDS_OFFSET + record * RECORD_BYTES
    content = log.content()
    for kept in range(0, 44, 7):
        yield content[: start + kept] + bytes(RECORD_BYTES - kept) + content[start + RECORD_BYTES :]


def test_a_torn_last_record_is_none() -> None:
    log = Log()
    log.append(link(1), link(2))
    for content in torn(log, 2):
        assert read_log(content, IDENTITY) == FoundLog(TAG, [link(1)])


def test_a_record_whose_store_failed_is_none() -> None:
    """Nobody was told of it, and later ones stand for themselves."""
    log = Log()
    log.append(link(1), link(2))
    for content in torn(log, 1):
        assert read_log(content, IDENTITY) == FoundLog(TAG, [link(2)])


def test_a_log_of_another_image_or_another_boot_is_void() -> None:
    log = Log()
    log.append(link(1))
    assert read_log(log.content(), b"you".ljust(32)) is None


@pytest.mark.parametrize("position", range(RECORDS_OFFSET - 8))
def test_each_byte_of_the_header_counts(position: int) -> None:
    content = bytearray(Log().content())
    content[position] ^= 0x40
    assert read_log(bytes(content), IDENTITY) is None


@given(st.binary(max_size=400), st.integers(0, 400))
def test_garbage_is_void_or_harmless(garbage: bytes, at: int) -> None:
    log = Log()
    log.append(*map(link, range(5)))
    content = bytearray(log.content())
    content[at : at + len(garbage)] = garbage
    found = read_log(bytes(content), IDENTITY)
    assert found is None or set(found.links) <= set(map(link, range(5)))


def test_a_log_that_is_too_long_is_void() -> None:
    assert read_log(Log().content().ljust(LOG_BYTES + 1, b"\0"), IDENTITY) is None
