"""The judge of the crash explorer, judged: what may a sector hold after a death."""

import pytest

from tests.crash.history import Flush, History, pattern

pytestmark = pytest.mark.pure


def write(history: History, request: int, begun: int, acked: int | None) -> bytes:
    content = pattern(request, 0)
    for version in history.begin({0: content}, begun):
        version.acked = acked
    return content


def test_unflushed_write_may_be_lost_to_power_but_not_to_kill() -> None:
    history = History(b"\7" * 512)
    new = write(history, 1, 10, 20)
    assert history.allowed(0, 30, power=True) == {b"\7" * 512, new}
    assert history.allowed(0, 30, power=False) == {new}


def test_write_acknowledged_before_a_flush_began_survives_its_acknowledgement() -> None:
    history = History(b"")
    new = write(history, 1, 10, 20)
    history.flushes.append(Flush(21, 30))
    assert history.allowed(0, 30, power=True) == {bytes(512), new}
    assert history.allowed(0, 31, power=True) == {new}


def test_flush_begun_before_the_acknowledgement_promises_nothing() -> None:
    history = History(b"")
    new = write(history, 1, 10, 20)
    history.flushes.append(Flush(15, 30))
    assert history.allowed(0, 31, power=True) == {bytes(512), new}


def test_concurrent_writes_may_end_either_way() -> None:
    history = History(b"")
    one = write(history, 1, 10, 30)
    two = write(history, 2, 20, 40)
    assert history.allowed(0, 50, power=False) == {one, two}


def test_writethrough_binds_at_the_acknowledgement() -> None:
    history = History(b"", writethrough=True)
    new = write(history, 1, 10, 20)
    assert history.allowed(0, 20, power=True) == {bytes(512), new}
    assert history.allowed(0, 21, power=True) == {new}


def test_discard_is_a_hint_that_supersedes_nothing() -> None:
    history = History(b"\7" * 512)
    for version in history.begin({0: bytes(512)}, 5, binding=False):
        version.acked = 6
    assert history.allowed(0, 10, power=False) == {b"\7" * 512, bytes(512)}


def test_a_read_shows_what_was_there_when_it_began_or_has_come_since() -> None:
    history = History(b"\7" * 512)
    one = write(history, 1, 10, 20)
    two = write(history, 2, 40, 50)
    assert history.shown(0, 5, 8) == {b"\7" * 512}
    assert history.shown(0, 15, 30) == {b"\7" * 512, one}
    assert history.shown(0, 30, 35) == {one}
    assert history.shown(0, 30, 60) == {one, two}
    assert history.shown(0, 60, 70) == {two}
