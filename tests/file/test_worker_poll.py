"""The rings are looked at for a moment before the worker sleeps, as long as that pays off, and not by an idle one."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.blockguest import MIB, OK, OUT, Guest

POLL_US = 1000


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    os.truncate(fd, MIB)
    yield fd
    os.close(fd)


def ask_until_it_polls(guest: Guest) -> None:
    """One request after the other: each sleep is short, so that soon it is worth while to look instead."""
    while guest.counters.polls == 0:
        assert guest.ask(OUT, 0, data=bytes(512)).status == OK


def test_a_busy_worker_looks_before_it_sleeps(fd: int) -> None:
    with Guest(fd, poll_us=POLL_US) as guest:
        ask_until_it_polls(guest)


def test_a_worker_that_was_told_not_to_never_looks(fd: int) -> None:
    with Guest(fd) as guest:
        for _ in range(500):
            assert guest.ask(OUT, 0, data=bytes(512)).status == OK
        assert guest.counters.polls == 0


def test_an_idle_worker_comes_to_rest(fd: int) -> None:
    """Each look and each sleep that brought nothing shortens the next look, so few wake-ups end it."""
    with Guest(fd, poll_us=POLL_US) as guest:
        ask_until_it_polls(guest)
        before = -1
        for _ in range(1000):
            if guest.counters.polls == before:
                break
            before = guest.counters.polls
            until = time.monotonic() + 5 * POLL_US / 1e6
            while time.monotonic() < until:
                os.sched_yield()  # longer idle than it would look
            guest.worker.call(lambda: None)
        else:
            pytest.fail("it looks on and on")
        cpu = time.thread_time_ns
        spent = guest.worker.call(cpu)
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            os.sched_yield()
        assert guest.worker.call(cpu) - spent < 3_000_000  # of 300 ms
        assert guest.counters.polls == before
